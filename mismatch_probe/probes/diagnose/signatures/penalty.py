"""One side samples with a penalty on tokens that the context already has."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, log_density, robust_fit
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.noise import uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_LEAST = 0.01
# Where nearly all tokens are seen ones, a penalty on them shifts both kinds; the rarer kind then far more.
_OTHER_SIGN = 0.25


@signature(
    "penalty",
    kind="labels",
    title="One side penalises tokens that stand earlier in the context, the other does not",
    causes=("repetition-penalty", "presence-penalty", "frequency-penalty"),
    confirm="Sample a few prompts with repetition, presence and frequency penalties off.",
    fix=(
        "Set `repetition_penalty=1`, `presence_penalty=0`, `frequency_penalty=0` in the sampling parameters: "
        "vLLM fills what they leave out from the "
        'model\'s generation_config.json (`generation_config="vllm"` switches that off).'
    ),
)
def penalty(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """d is of one sign on tokens seen before and of the other on new ones, and vanishes as p → 1."""
    q = np.exp(uncertainty(state.expected))
    seen = evidence.seen
    # By how much oftener than the tokens so far: what a penalty per occurrence takes off, less what it gives to all.
    often = evidence.again - np.bincount(evidence.sequence, evidence.again)[evidence.sequence] / np.maximum(
        np.bincount(evidence.sequence)[evidence.sequence], 1
    )
    weights = (seen, ~seen, evidence.again > 0, often)
    columns = np.stack([weight * one for one in (q, q * q) for weight in weights])
    use = train & state.known
    if min(int((use & seen).sum()), int((use & ~seen).sum())) < 50:
        return None
    shift = robust_fit(evidence, state, train, columns)
    on_seen, on_new = (float(np.mean(shift[use & some])) for some in (seen, ~seen))
    smaller, larger = sorted((abs(on_seen), abs(on_new)))
    if abs(on_seen - on_new) < _LEAST or (on_seen * on_new > 0 and smaller > _OTHER_SIGN * larger):
        return None
    moved = state.moved(state.expected + shift)
    side = "rollout" if on_seen > on_new else "trainer"
    shown = state.known & seen
    return Fit(
        log_density(evidence, moved, train), moved, shown, {"side": side, "mean_d_seen": on_seen, "mean_d_new": on_new}
    )
