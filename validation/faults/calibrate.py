"""How often an answer is right, by what its confidence is made of: a logistic map, fitted on the development half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_expit

from validation.faults.score import Entry, Judged, below_floor, right_classes

# More nats and a larger lead never make an answer less sure; what is left, and no baseline, never surer.
_SIGNS = (0, 1, 1, -1, -1, -1, -1, 1)
_RIDGE = 0.02


def answers(truth: Mapping[str, Entry], results: Sequence[Judged]) -> list[tuple[str, tuple[float, ...], bool]]:
    """Fault, features and whether it is right: of the first class of every case, and of every class that is named when
    the right signature is switched off, of which none is.
    """
    found = []
    for one in results:
        entry = truth[one.name]
        if not entry["clean"] and below_floor(entry, one):
            continue
        right = right_classes(entry)
        found += [(entry["fault"], a.features, a.name in right and not entry["clean"]) for a in one.found[:1]]
        found += [(entry["fault"], a.features, False) for a in one.unknown]
    return found


def fitted(rows: Sequence[tuple[str, tuple[float, ...], bool]]) -> NDArray[np.float64]:
    """Weights of a constant and the features; every fault counts alike."""
    faults = [fault for fault, _, _ in rows]
    weight = np.array([1 / faults.count(fault) for fault in faults])
    weight /= weight.sum()
    x = np.array([(1.0, *values) for _, values, _ in rows])
    sign = np.where([right for _, _, right in rows], 1.0, -1.0)

    def loss(w: NDArray[np.float64]) -> float:
        return float(-(weight * log_expit(sign * (x @ w))).sum() + _RIDGE * (w[1:] ** 2).sum() / len(w))

    bounds = [{0: (None, None), 1: (0, None), -1: (None, 0)}[one] for one in _SIGNS]
    return np.asarray(minimize(loss, np.zeros(x.shape[1]), bounds=bounds, method="L-BFGS-B").x)
