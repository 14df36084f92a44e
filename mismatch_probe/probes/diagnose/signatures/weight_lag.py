"""Tokens of older weights, as asynchronous training has them."""

from __future__ import annotations

import numpy as np

from mismatch_probe.metrics.chunks import UNSAMPLED, WEIGHT_VERSION
from mismatch_probe.probes.diagnose.base import Fit, State, by_level
from mismatch_probe.probes.diagnose.evidence import Evidence, Ints, Mask
from mismatch_probe.probes.diagnose.signatures import signature
from mismatch_probe.probes.groups import NONE

_MOST = 8


@signature(
    "weight-lag",
    kind="weights",
    title="The gap grows with the age of the weights that sampled",
    causes=("async-staleness", "switch-within-response"),
    confirm="Compare the metrics of tokens at lag 0 with a healthy run.",
    fix=(
        "This is staleness, not the engine: lower the allowed lag, or correct with importance ratios of the "
        "sampling weights."
    ),
)
def weight_lag(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise where the weights that sampled are older."""
    lag = lag_of(evidence)
    return None if lag is None else by_level(evidence, state, train, np.minimum(lag, _MOST), {}, rising=True)


def lag_of(evidence: Evidence) -> Ints | None:
    """`[N]` how many versions older than the trainer's, or its step's newest, a token's weights are; -1 for none."""
    version = evidence.tokens.get(WEIGHT_VERSION)
    if version is None:
        return None
    version = np.asarray(version, np.int64)
    newest = evidence.rows.get("trainer_version")
    if newest is None:
        steps = evidence.of_sequence(evidence.rows.get("step", np.zeros_like(evidence.prompt)))
        _, step = np.unique(steps, return_inverse=True)
        top = np.full(int(step.max(initial=0)) + 1, UNSAMPLED)
        np.maximum.at(top, step, version)
        of_token = top[step]
    else:
        of_token = evidence.of_sequence(newest)
    return np.where(version == UNSAMPLED, NONE, np.maximum(of_token - version, 0))
