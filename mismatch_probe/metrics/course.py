"""How a logged metric goes over training steps: its size, its largest jump and its trend, all by robust statistics.

Shape legend: `N` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.types import MetricValue

Floats = NDArray[np.float64]
_TO_SIGMA = 1.4826  # of a normal distribution, over its MAD
_FOR_JUMP, _FOR_TREND = 5, 8  # fewer steps say nothing
_BLOCKS = 400
_AS_LARGE = 0.9


@dataclass(frozen=True)
class Jump:
    """The largest change from one step to the next.

    Attributes:
        before: Index of the step before it.
        units: Its distance from the median change, in standard deviations that the MAD of all changes stands for; None
            where more than half of all changes are equal, so that there is no such unit.
    """

    before: int
    units: float | None


@dataclass(frozen=True)
class Trend:
    """A monotone trend.

    Attributes:
        per_100: Theil–Sen slope with its 95 % interval, per 100 steps.
        tau: Kendall's τ of values and steps.
        p: Its p-value, of independent steps; neighbouring steps of a run are not, so it is too small.
    """

    per_100: MetricValue
    tau: float
    p: float


def largest_jump(values: Floats) -> Jump | None:
    """The largest change of `values` `[N]`, in order of steps; None below 5 steps or where nothing changes.

    Of changes that are at least 0.9 times as large it is the first: of a spike the rise, not the fall.
    """
    if len(values) < _FOR_JUMP:
        return None
    changes = np.diff(values)
    distances = np.abs(changes - np.median(changes))
    if not distances.any():
        return None
    index = int(np.argmax(distances >= _AS_LARGE * distances.max()))
    mad = float(np.median(distances))
    units = float(distances[index] / (_TO_SIGMA * mad)) if mad > 0 else np.inf
    return Jump(index, units if np.isfinite(units) else None)


def trend(steps: Floats, values: Floats) -> Trend | None:
    """The trend of `values` `[N]` over `steps` `[N]`, increasing; None below 8 steps or where nothing changes.

    Above 400 steps, of the medians of 400 blocks of steps: slopes are between all pairs.
    """
    if len(values) < _FOR_TREND or values.max() == values.min():
        return None
    if len(values) > _BLOCKS:
        pieces = np.array_split(np.arange(len(values)), _BLOCKS)
        steps = np.array([np.median(steps[piece]) for piece in pieces])
        values = np.array([np.median(values[piece]) for piece in pieces])
        if values.max() == values.min():
            return None
    slope, _, low, high = stats.theilslopes(values, steps, alpha=0.95)
    tau = stats.kendalltau(steps, values)
    per_100 = MetricValue(100 * float(slope), 100 * float(low), 100 * float(high))
    return Trend(per_100, float(tau.statistic), float(tau.pvalue))
