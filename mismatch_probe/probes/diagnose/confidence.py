"""How sure an answer is: a logistic map of what a signature gains, of its lead over rivals, and of what it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mismatch_probe.probes.diagnose.base import mean_gap, widens
from mismatch_probe.probes.diagnose.evidence import Evidence

if TYPE_CHECKING:
    from mismatch_probe.probes.diagnose.run import Found

FEATURES = (
    "log10 of nats gained",
    "lead",
    "log of what is left over rounding",
    "no baseline",
    "by exclusion",
    "more noise only",
    "a fact",
)
WEIGHTS = (-1.123, 0.913, 0.0, -0.438, -0.408, -1.799, -0.386, 0.0)
"""Of a constant and the features: fitted by `python -m validation.faults calibrate`."""
_LEAST_NATS, _MOST_NATS, _MOST_LEFT = 1.0, 1e4, float(np.log(30))


def features(evidence: Evidence, one: Found) -> tuple[float, ...]:
    """What the confidence is made of: as in `FEATURES`.

    The lead is the share of the gain that the next rival does not have. What is left is the mean size, beside the
    baseline's, of what the class does not explain: of tokens that it moves, and of those that do not show it.
    """
    best, signature = one.candidate, one.candidate.signature
    nats = np.clip(best.total, _LEAST_NATS, _MOST_NATS)
    # What is told by exclusion gains on another scale.
    rivals = [rival.gain for rival in one.rivals if not rival.signature.last]
    lead = np.clip(1 - max(rivals, default=0.0) / best.gain, 0, 1)
    fact, baseline = signature.seen_by == "fact", evidence.baseline
    left = 1.0 if fact or baseline is None else max(_left(evidence, one) / max(baseline, 1e-9), 1.0)
    return (
        float(np.log10(nats)),
        float(lead),
        float(np.clip(np.log(left), 0, _MOST_LEFT)),
        float(baseline is None),
        float(signature.last),
        float(widens(best.fit, one.before)),
        float(fact),
    )


def _left(evidence: Evidence, one: Found) -> float:
    after, shown = one.candidate.fit.state, one.candidate.fit.shown
    moved = shown & (after.expected != one.before.expected)
    return max(mean_gap(evidence, after, moved), mean_gap(evidence, after, ~shown))


def confidence(values: tuple[float, ...]) -> float:
    """In [0, 1], of an answer with such features."""
    score = float(np.dot(WEIGHTS, (1.0, *values)))
    return float(np.clip(1 / (1 + np.exp(-score)), 0.01, 0.99))
