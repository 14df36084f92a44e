"""Algorithms: each is registered once, beside the function that makes its surrogate loss.

A module of this package registers algorithms and is found by itself. None imports torch: a surrogate is given tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mismatch_probe.registered import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mismatch_probe.metrics.corrections import Correction

Aggregation = Literal["budget", "sequence-mean", "token-mean"]
Advantages = Callable[["NDArray[Any]", "NDArray[Any]"], "NDArray[np.float64]"]
Surrogate = Callable[["Algorithm", "Tensor", "Tensor", "Tensor", "Tensor"], tuple["Tensor", "Tensor"]]


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient algorithm. π is the policy that is trained, π′ the same before the step's updates, μ the
    rollout engine's.

    Attributes:
        surrogate: `(algorithm, log π [B, T] with gradient, log π′ [B, T], advantages [B, T], mask [B, T])` to the
            losses of tokens before correction `[B, T]`, and which of them the clip holds `[B, T]`.
        advantages: From rewards `[N]` and the group of each `[N]` to advantages `[N]`.
        correction: For μ; None for none.
        weights_of: Whose ratio to μ the correction takes: of `current` π or of `old` π′.
        clip_low: The ratio's lower bound is 1 − clip_low; 1 is no bound.
        clip_high: Its upper bound is 1 + clip_high.
        aggregation: `budget`: sum over tokens / (sequences × budget); `sequence-mean`: mean over sequences of the mean
            over their tokens; `token-mean`: sum over tokens / tokens.

    Raises:
        ValueError: The clip range is none.
    """

    surrogate: Surrogate
    advantages: Advantages
    correction: Correction | None = None
    weights_of: Literal["current", "old"] = "old"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Aggregation = "budget"

    def __post_init__(self) -> None:
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"the clip range [1 − {self.clip_low:g}, 1 + {self.clip_high:g}] is not valid")

    @property
    def per_sequence(self) -> bool:
        """Whether the correction has one weight a sequence, not one a token."""
        return self.correction is not None and self.correction.level != "token"


_REGISTRY = Registry[Algorithm](__name__, "algorithm")


def algorithm(name: str, advantages: Advantages, **options: Any) -> Callable[[Surrogate], Surrogate]:
    """Registers an algorithm with the surrogate that it decorates.

    Args:
        name: Its name in a configuration.
        advantages: See `Algorithm`.
        options: The other fields of `Algorithm`.

    Raises:
        ValueError: The name is taken.
    """

    def register(surrogate: Surrogate) -> Surrogate:
        _REGISTRY.add(name, Algorithm(surrogate, advantages, **options))
        return surrogate

    return register


def algorithms() -> dict[str, Algorithm]:
    """Every registered algorithm, by name."""
    return _REGISTRY.sorted()
