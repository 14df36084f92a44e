"""One side's distribution cut to its likeliest tokens, or padded with tokens that nobody samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mismatch_probe.metrics.hypotheses import MOST_TOP, size
from mismatch_probe.probes.diagnose.evidence import Floats
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import SIDES, Hypothesis, Named, Subject

_FIX = (
    "Sample without truncation (top_p=1, top_k=-1, min_p=0; look into generation_config.json, too), or apply the same "
    "mask at the trainer."
)
_GRIDS: dict[str, tuple[float, ...]] = {
    "top_p": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999),
    "top_k": (2, 3, 4, 5, 8, 10, 15, 20, 25, 30, 40, 50, 64, 80, 100, 128, 200, 256, 500, 512, 1000, 1024),
    "min_p": (
        0.5,
        0.3,
        0.25,
        0.2,
        0.15,
        0.1,
        0.08,
        0.07,
        0.06,
        0.05,
        0.04,
        0.03,
        0.025,
        0.02,
        0.015,
        0.01,
        0.005,
        0.002,
        0.001,
    ),
}
_AS_GOOD = 1.01
_CAUSES = {
    name: Named(name.replace("_", "-"), f"Log-probs are those of a distribution cut by {name}", _FIX) for name in _GRIDS
}
_PADDED = Named(
    "padded-vocabulary",
    "Padding rows of the vocabulary take part in the softmax",
    "Cut logits to the tokenizer's vocabulary before the softmax.",
)


@experiment("truncation", classes=("truncation",), forwards=0)
def run(subject: Subject) -> Iterator[Hypothesis]:
    """Scans each kind of truncation for each side."""
    rows = subject.rows
    cut: dict[str, Callable[[float], Floats]] = {
        "top_p": rows.top_p,
        "top_k": lambda k: rows.top_k(int(k)),
        "min_p": rows.min_p,
    }
    kept = {name: [(value, cut[name](value)) for value in grid if value <= MOST_TOP] for name, grid in _GRIDS.items()}
    for side in SIDES:
        use = subject.among(side)
        if not use.any():
            continue
        recorded = subject.recorded(side)[use]
        for name, columns in kept.items():
            losses = np.array([size(recorded - column[use]) for _, column in columns])
            # Of values that cut the same tokens the weakest, which comes last.
            value, column = columns[int(np.flatnonzero(losses <= _AS_GOOD * losses.min())[-1])]
            yield Hypothesis(f"{side} cut by {name}", _CAUSES[name], column, {name: float(value)}, only=side)


@experiment("padded-vocabulary", classes=("truncation",), forwards=0)
def padded(subject: Subject) -> Iterator[Hypothesis]:
    """Fits how many further tokens with the logit 0 take part."""
    for side in SIDES:
        fit = subject.fit(side, subject.rows.padded, [float(x) for x in range(14)], 1e-2)
        if fit is not None:
            found = {"rows": float(round(np.exp(fit[0])))}
            yield Hypothesis(f"{side} with a padded vocabulary", _PADDED, fit[1], found, only=side)
