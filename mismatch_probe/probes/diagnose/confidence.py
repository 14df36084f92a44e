"""How sure an answer is: a logistic map of what a signature gains and of what it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mismatch_probe.probes.diagnose.base import mean_gap, widens
from mismatch_probe.probes.diagnose.evidence import Evidence

if TYPE_CHECKING:
    from mismatch_probe.probes.diagnose.run import Found

FEATURES = (
    "log10 of nats gained",
    "log of what is left over rounding",
    "no baseline",
    "by exclusion",
    "more noise only",
)
WEIGHTS = (-2.308, 1.195, -0.331, -0.475, -1.505, -0.334)
"""Of a constant and the features: fitted by `python -m validation.faults calibrate`."""
_LEAST_NATS, _MOST_NATS, _MOST_LEFT = 1.0, 1e4, float(np.log(30))


def features(evidence: Evidence, one: Found) -> tuple[float, ...]:
    """What the confidence is made of: as in `FEATURES`.

    What is left is the mean size, beside the baseline's, of what the class does not explain: of tokens that it moves,
    and of those that do not show it. Beside facts something else may be off, and beside an unknown baseline nothing is
    known to be left.
    """
    best, signature, baseline = one.candidate, one.candidate.signature, evidence.baseline
    asked = baseline is not None and signature.seen_by != "fact"
    left = max(_left(evidence, one) / max(baseline or 0.0, 1e-9), 1.0) if asked else 1.0
    return (
        float(np.log10(np.clip(best.total, _LEAST_NATS, _MOST_NATS))),
        float(np.clip(np.log(left), 0, _MOST_LEFT)),
        float(baseline is None),
        float(signature.last),
        float(widens(best.fit, one.before)),
    )


def _left(evidence: Evidence, one: Found) -> float:
    after, shown = one.candidate.fit.state, one.candidate.fit.shown
    moved = shown & (after.expected != one.before.expected)
    return max(mean_gap(evidence, after, moved), mean_gap(evidence, after, ~shown))


def confidence(values: tuple[float, ...]) -> float:
    """In [0, 1], of an answer with such features."""
    score = float(np.dot(WEIGHTS, (1.0, *values)))
    return float(np.clip(1 / (1 + np.exp(-score)), 0.01, 0.99))
