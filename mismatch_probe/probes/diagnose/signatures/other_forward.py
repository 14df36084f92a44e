"""Noise that is larger than rounding, at every token alike: what a table cannot tell further."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import BEYOND_BASELINE, Fit, State, log_density, mean_gap
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature

LARGEST_ROUNDING = 0.2
"""Mean |d| in nats that no rounding was seen to exceed, where no baseline is known."""
_LEAST = 1e-3  # nats: of less, one flip of a route in FP32 is many times an audit's mean


@signature(
    "other-forward",
    last=True,
    kind="forward",
    title="The two sides compute other distributions, at every token alike and without a pattern",
    causes=(
        "older-weights",
        "adapter-ignored",
        "partial-load",
        "layer-forgotten",
        "wrong-mapping",
        "quantised-weights",
        "fp8-cache",
        "dropout",
        "coarser-rounding",
        "soft-cap-or-sink-missing",
        "engine-forward",
    ),
    confirm="Score the same ids with the older checkpoint, the base model, and twice with the trainer.",
    fix=(
        "A table cannot tell these causes apart. Check that the engine has every tensor of the newest weights and the "
        "adapter, that both sides have the same quantisation, and that the trainer is in eval mode."
    ),
)
def other_forward(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """What is left is symmetric noise, larger than rounding is."""
    plain = state.known & (state.spread == 0)
    least = LARGEST_ROUNDING if evidence.baseline is None else max(BEYOND_BASELINE * evidence.baseline, _LEAST)
    gap = mean_gap(evidence, state, plain)
    if gap <= least:
        return None
    # The log-likelihood that noise of the largest rounding would lose to the fitted one, at least: log of their ratio.
    found = log_density(evidence, state, train) + np.log(gap / least) * plain
    told = {} if evidence.baseline is None else {"times_baseline": gap / evidence.baseline}
    return Fit(found, state, plain, {"mean_abs": gap, **told})
