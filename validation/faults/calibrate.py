"""How often an answer is right, by what its confidence is made of: a logistic map, fitted on the development half."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_expit

from validation.faults.score import Entry, Judged, below_floor, right_classes

# More nats never make an answer less sure, and the others never surer.
_SIGNS = (0, 1, -1, -1, -1, -1)
_RIDGE = 0.005
UNKNOWN = 0.25
"""Of faults, how many are of a kind that no signature knows: a guess."""


@dataclass(frozen=True)
class Answered:
    """A class that was named of a fault: with what features, whether it is right, and whether a right one was known."""

    fault: str
    features: tuple[float, ...]
    right: bool
    known: bool


def answers(truth: Mapping[str, Entry], results: Sequence[Judged]) -> list[Answered]:
    """The first class of every case, and every class that is named when the right signature is switched off."""
    found = []
    for one in results:
        entry = truth[one.name]
        if not entry["clean"] and below_floor(entry, one.baseline):
            continue
        right = right_classes(entry)
        found += [
            Answered(entry["fault"], a.features, a.name in right and not entry["clean"], True) for a in one.found[:1]
        ]
        found += [Answered(entry["fault"], a.features, False, False) for a in one.unknown]
    return found


def fitted(rows: Sequence[Answered]) -> NDArray[np.float64]:
    """Weights of a constant and the features; every fault counts alike, and unknown ones `UNKNOWN` of all."""
    counts = Counter((row.fault, row.known) for row in rows)
    weight = np.array([1 / counts[row.fault, row.known] for row in rows])
    known = np.array([row.known for row in rows])
    weight *= np.where(known, (1 - UNKNOWN) / weight[known].sum(), UNKNOWN / max(weight[~known].sum(), 1e-9))
    x = np.array([(1.0, *row.features) for row in rows])
    sign = np.where([row.right for row in rows], 1.0, -1.0)

    def loss(w: NDArray[np.float64]) -> float:
        return float(-(weight * log_expit(sign * (x @ w))).sum() + _RIDGE * (w[1:] ** 2).sum() / len(w))

    bounds = [{0: (None, None), 1: (0, None), -1: (None, 0)}[one] for one in _SIGNS]
    return np.asarray(minimize(loss, np.zeros(x.shape[1]), bounds=bounds, method="L-BFGS-B").x)
