"""Which of two quantities of training runs goes first: correlations of their series at lags, over runs.

Series of one run have trends and are correlated with themselves, so steps are no units: permuting them, or shifting one
series in a circle, calls 15 to 100 % of unrelated series related. Runs are units. Where a quantity has nothing to do
with the other of its own run, another run's would serve as well: the correlation of a run's series with each other is
compared with those of series paired across runs. What all runs have in common, such as learning curves, is in both.

Shape legend: `R` runs, `T` steps, `K` lags.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.inference import Floats

# With fewer runs the p-value cannot be below .05: there are R! pairings.
MIN_RUNS = 4
_FEWEST_STEPS = 8
# All pairings of up to 7 runs; beyond, so many random ones and the observed one.
_PAIRINGS = 9999


@dataclass(frozen=True)
class Lead:
    """One lag.

    Attributes:
        lag: Steps by which the second series is later; where negative, the second goes first.
        correlation: Pearson's, of `first[t]` and `second[t + lag]` of the same run, mean over runs.
        elsewhere: The same of series paired across runs, mean over pairings.
        p_value: Two-sided: share of pairings of runs whose distance from `elsewhere`, in standard deviations over
            pairings and at the lag where that is largest, is at least the one seen here. So it is adjusted over lags
            (Westfall and Young 1993).
    """

    lag: int
    correlation: float
    elsewhere: float
    p_value: float


def leads(first: ArrayLike, second: ArrayLike, lags: Sequence[int]) -> tuple[Lead, ...]:
    """Correlations at each lag.

    Args:
        first: `[R, T]`, a series a run.
        second: `[R, T]` of the same runs and steps.
        lags: Steps, of either sign.

    Raises:
        UsageError: There are too few runs or steps, a value is not finite, or a series does not change.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    _check(x, y, lags)
    table = np.stack([_correlations(x, y, lag) for lag in lags])  # [K, R, R]
    found = table[:, np.arange(len(x)), _pairings(len(x))].mean(
        axis=2
    )  # [K, pairings], of which the first is a run's own
    centre, spread = found.mean(axis=1, keepdims=True), found.std(axis=1, keepdims=True)
    distance = np.abs(found - centre) / np.where(spread > 0, spread, np.inf)
    largest = distance.max(axis=0)
    return tuple(
        Lead(int(lag), float(found[k, 0]), float(centre[k, 0]), float((largest >= distance[k, 0] * (1 - 1e-12)).mean()))
        for k, lag in enumerate(lags)
    )


def _pairings(runs: int) -> NDArray[np.int64]:
    """`[N, R]`, the first of which leaves every series with its own."""
    if math.factorial(runs) <= _PAIRINGS:
        return np.array(list(itertools.permutations(range(runs))))
    rng = np.random.default_rng(0)
    return np.stack([np.arange(runs), *(rng.permutation(runs) for _ in range(_PAIRINGS))])


def _correlations(x: Floats, y: Floats, lag: int) -> Floats:
    """`[R, R]` Pearson's, of every first series with every second one."""
    n = x.shape[1] - abs(lag)
    early, late = x[:, max(0, -lag) :][:, :n], y[:, max(0, lag) :][:, :n]
    centred = (part - part.mean(axis=1, keepdims=True) for part in (early, late))
    one, other = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in centred)
    found: Floats = one @ other.T
    return found


def _check(x: Floats, y: Floats, lags: Sequence[int]) -> None:
    if x.shape != y.shape or x.ndim != 2:
        raise UsageError(f"Series of the shapes {x.shape} and {y.shape} do not pair.", "Give [runs, steps] of both.")
    if len(x) < MIN_RUNS:
        raise UsageError(f"{len(x)} runs cannot show which goes first.", f"Give at least {MIN_RUNS}.")
    if not lags or x.shape[1] - max(map(abs, lags)) < _FEWEST_STEPS:
        raise UsageError(f"{x.shape[1]} steps are too few for these lags.", f"Leave {_FEWEST_STEPS} steps at each lag.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UsageError("A series has a value that is not finite.", "Leave that run or those steps out.")
    ends = max(map(abs, lags))
    inner = slice(ends, x.shape[1] - ends)
    if not (np.ptp(x[:, inner], axis=1).all() and np.ptp(y[:, inner], axis=1).all()):
        raise UsageError("A series does not change, so it has no correlation.", "Leave that run out.")
