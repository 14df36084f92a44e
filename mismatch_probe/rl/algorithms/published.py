"""Published algorithms, with the constants of Qi et al. (arXiv 2510.26788) and the scripts of its code; IcePop's and
CISPO's are their authors'.

Shape legend: `N` responses, `B` sequences, `T` response tokens, padded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.corrections import CORRECTIONS, Correction
from mismatch_probe.rl.algorithms import Algorithm, algorithm

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
# Added to a group's standard deviation, so that a group of equal rewards gets advantages of 0.
STD_EPSILON = 1e-6


def centred(rewards: NDArray[Any], group: NDArray[Any]) -> Floats:
    """Rewards less the mean of their group, which includes the response itself (Dr. GRPO).

    The expected gradient of such a policy gradient is that of J times 1 − 1/G for groups of G.

    Args:
        rewards: `[N]`.
        group: `[N]` int, which group a response belongs to; any numbers, in any order.

    Returns:
        `[N]` float64; 0 in a group of one.
    """
    return _centred(rewards, group)[0]


def standardised(rewards: NDArray[Any], group: NDArray[Any]) -> Floats:
    """`centred`, over the group's standard deviation with G − 1 in its denominator, plus 1e-6 (GRPO, as verl, TRL and
    Oat compute it).
    """
    values, index, size = _centred(rewards, group)
    squares = np.bincount(index, weights=values**2)
    std = np.sqrt(squares / np.maximum(size - 1, 1))
    found: Floats = values / (std[index] + STD_EPSILON)
    return found


def leave_one_out(rewards: NDArray[Any], group: NDArray[Any]) -> Floats:
    """Rewards less the mean of the others in their group (RLOO): G/(G − 1) times `centred`, hence unbiased.

    Raises:
        UsageError: A response is alone in its group.
    """
    values, index, size = _centred(rewards, group)
    if (size < 2).any():
        raise UsageError(
            "A group has a single response, so the others have no mean.",
            "Sample two or more responses for each prompt.",
        )
    found: Floats = values * (size / (size - 1))[index]
    return found


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


def _at(name: str, cap: float) -> Correction:
    return replace(CORRECTIONS[name], high=cap)


@algorithm("pg", centred, weights_of="current")
@algorithm("pg-token-tis", centred, weights_of="current", correction=CORRECTIONS["token-tis"])
@algorithm("pg-token-mis", centred, weights_of="current", correction=CORRECTIONS["token-mis"])
@algorithm("pg-seq-is", centred, weights_of="current", correction=CORRECTIONS["seq-is"])
@algorithm("pg-seq-tis", centred, weights_of="current", correction=CORRECTIONS["seq-tis"])
@algorithm("pg-seq-mis", centred, weights_of="current", correction=CORRECTIONS["seq-mis"])
def plain(of: Algorithm, current: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """−A log π: nothing limits an update."""
    return -advantage * current, mask.new_zeros(mask.shape)


@algorithm("grpo", standardised, aggregation="sequence-mean")
@algorithm("grpo-token-tis", standardised, correction=CORRECTIONS["token-tis"], aggregation="sequence-mean")
# The paper has no Seq-TIS here: with the cap of Seq-MIS the two differ in one thing only.
@algorithm("grpo-seq-tis", standardised, correction=_at("seq-tis", 10.0), aggregation="sequence-mean")
@algorithm("grpo-seq-mis", standardised, correction=_at("seq-mis", 10.0), aggregation="sequence-mean")
@algorithm("dr-grpo", centred)
@algorithm("dr-grpo-token-tis", centred, correction=CORRECTIONS["token-tis"])
@algorithm("dr-grpo-seq-tis", centred, correction=_at("seq-tis", 10.0))
@algorithm("dr-grpo-seq-mis", centred, correction=_at("seq-mis", 10.0))
@algorithm("icepop", standardised, correction=CORRECTIONS["token-mis"], aggregation="sequence-mean")
def clip(of: Algorithm, current: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """PPO's clip of r = π/π′ per token."""
    return _clipped(of, current - old, advantage)


@algorithm("gspo", standardised, clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean")
def sequence_clip(
    of: Algorithm, current: Tensor, old: Tensor, advantage: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """GSPO's clip of the geometric mean of r over the sequence.

    The value is the sequence's, the gradient the token's own: GSPO-token, the same as GSPO where the tokens of a
    sequence share their advantage.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (current - old).detach().sum(dim=1, keepdim=True) / lengths
    return _clipped(of, current - current.detach() + mean, advantage)


# An upper bound of 5 and no lower one, as in ScaleRL and in TRL's documentation.
@algorithm("cispo", standardised, clip_low=1.0, clip_high=4.0, aggregation="token-mean")
def cispo(of: Algorithm, current: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """CISPO's cap of r as a weight, through which no gradient goes."""
    low, high = _bounds(of)
    fixed = (current - old).detach()
    return -fixed.clamp(low, high).exp() * advantage * current, (fixed < low) | (fixed > high)


def _clipped(of: Algorithm, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _bounds(of)
    clipped = ((advantage > 0) & (log_ratio > high)) | ((advantage < 0) & (log_ratio < low))
    bounded = log_ratio.detach().clamp(low, high).where(clipped, log_ratio)
    return -advantage * bounded.exp(), clipped


def _bounds(of: Algorithm) -> tuple[float, float]:
    """Logarithms of the ratio's bounds."""
    return math.log(1 - of.clip_low) if of.clip_low < 1 else -math.inf, math.log1p(of.clip_high)
