"""Advantages of responses from the rewards of their group, the responses to one prompt.

Shape legend: `N` responses.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import UsageError

Floats = NDArray[np.float64]
AdvantageKind = Literal["centred", "standardised"]
# Added to a group's standard deviation, so that a group of equal rewards gets advantages of 0.
STD_EPSILON = 1e-6


def group_advantages(rewards: NDArray[Any], group: NDArray[Any], kind: AdvantageKind) -> Floats:
    """Rewards less the mean of their group, which includes the response itself.

    The expected gradient of such a policy gradient is that of J times 1 − 1/G for groups of G.

    Args:
        rewards: `[N]`.
        group: `[N]` int, which group a response belongs to; any numbers, in any order.
        kind: `centred` subtracts the mean alone (Dr. GRPO); `standardised` also divides by the group's standard
            deviation, with G − 1 in its denominator, plus 1e-6 (GRPO, as verl, TRL and Oat compute it).

    Returns:
        `[N]` float64; 0 in a group of one.
    """
    centred, index, size = _centred(rewards, group)
    if kind == "centred":
        return centred
    squares = np.bincount(index, weights=centred**2)
    std = np.sqrt(squares / np.maximum(size - 1, 1))
    standardised: Floats = centred / (std[index] + STD_EPSILON)
    return standardised


def leave_one_out(rewards: NDArray[Any], group: NDArray[Any]) -> Floats:
    """Rewards less the mean of the others in their group (RLOO): G/(G − 1) times `centred`, hence unbiased.

    Args:
        rewards: `[N]`.
        group: `[N]` int, as in `group_advantages`.

    Returns:
        `[N]` float64.

    Raises:
        UsageError: A response is alone in its group.
    """
    centred, index, size = _centred(rewards, group)
    if (size < 2).any():
        raise UsageError(
            "A group has a single response, so the others have no mean.",
            "Sample two or more responses for each prompt.",
        )
    unbiased: Floats = centred * (size / (size - 1))[index]
    return unbiased


def _centred(rewards: NDArray[Any], group: NDArray[Any]) -> tuple[Floats, NDArray[np.intp], NDArray[np.intp]]:
    values = np.asarray(rewards, dtype=np.float64)
    _, index = np.unique(group, return_inverse=True)
    size = np.bincount(index)
    # Less the group's first reward before anything is summed: then equal rewards give exactly 0, not a rounding error
    # that dividing by the standard deviation would blow up.
    first = np.empty(len(size))
    first[index[::-1]] = values[::-1]
    offset = values - first[index]
    return offset - (np.bincount(index, weights=offset) / size)[index], index, size
