"""Which classes of a trainer's modules to compute in FP32: what each buys of the gap, and what it costs.

Shape legend: `N` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Times of two passes differ by this much for no reason: below it a cost is none.
_NOISE = 0.05
Part = tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Fix:
    """A set of classes in FP32.

    Attributes:
        classes: Their names, in the order in which they were added.
        left: RMS of the gap over the baseline's.
        cost: Time that it adds, as a part of the baseline's.
    """

    classes: tuple[str, ...]
    left: float
    cost: float

    @classmethod
    def of(cls, classes: tuple[str, ...], rollout_logprobs: NDArray[np.float64], base: Part, part: Part) -> Fix:
        """From two readings (facts with `seconds`, and `logprobs` `[N]`); what breaks tokens closes nothing."""
        after, before = (np.asarray(reading[1]["logprobs"], np.float64) - rollout_logprobs for reading in (part, base))
        finite = np.isfinite(before)
        gaps = [float(np.mean(gap[finite] ** 2)) if finite.any() else 0.0 for gap in (after, before)]
        left = float(np.sqrt(gaps[0] / gaps[1])) if gaps[1] > 0 else 1.0
        left = left if np.isfinite(left) else np.inf
        return cls(classes, left, float(part[0]["seconds"]) / float(base[0]["seconds"]) - 1)


def next_set(fixes: Sequence[Fix], target: float) -> tuple[str, ...] | None:
    """The set to try after those that were tried: the largest tried one, and the next class by gain per time.

    Classes that close nothing by themselves come last, and come: rounding elsewhere can hide what they would do.

    Args:
        fixes: Every class by itself, and the sets so far.
        target: Part of the gap's RMS that may be left.

    Returns:
        None where a set meets the target, or no class is left.
    """
    if any(fix.left <= target for fix in fixes):
        return None
    singles = [fix for fix in fixes if len(fix.classes) == 1]
    order = [fix.classes[0] for fix in sorted(singles, key=_gain_per_time, reverse=True)]
    tried = max((len(fix.classes) for fix in fixes), default=0)
    return tuple(order[: tried + 1]) if tried < len(order) else None


def cheapest(fixes: Sequence[Fix], target: float) -> Fix | None:
    """Of the sets that were tried, the one that meets the target at the least cost; where costs tie, the closest."""
    fit = [fix for fix in fixes if fix.left <= target]
    return min(fit, key=lambda fix: (max(fix.cost, _NOISE), fix.left), default=None)


def _gain_per_time(fix: Fix) -> float:
    """Share of mean d² that goes, by time."""
    return (1 - fix.left**2) / max(fix.cost, _NOISE)
