"""Corrections of importance ratios: the one table of them, and the fraction of tokens that each would touch.

The trainer's policy over the rollout engine's weights a token by ρ = exp(d), a sequence by w = exp(D), and keeps or
drops a sequence by its geometric mean g = exp(D / T). Names and bounds are those of arXiv 2510.26788, TRL and verl.

Shape legend: `N` tokens, `S` sequences, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.chunks import usable_rows
from mismatch_probe.metrics.intervals import rare_share_interval, share_interval
from mismatch_probe.types import MetricValue, PairArrays

_RARE = 0.01
_SYMBOLS = {"token": "ρ", "sequence": "w", "geometric": "g"}


@dataclass(frozen=True)
class Correction:
    """A correction with its bounds.

    Attributes:
        name: Short.
        title: In words.
        level: Whose weight it is: a token's, a sequence's, or 1 by a sequence's geometric mean.
        low, high: Bounds of the weight, beyond which it is capped or masked; 0 and infinity are no bounds.
        masks: Whether what lies beyond is masked rather than capped.

    Raises:
        ValueError: The bounds leave no weight, or a lower one is to cap.
    """

    name: str
    title: str
    level: Literal["token", "sequence", "geometric"]
    low: float
    high: float
    masks: bool

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high or (self.low > 0 and not self.masks):
            raise ValueError(f"{self.name} has the bounds {self.low:g} and {self.high:g}")

    @property
    def bounded(self) -> bool:
        """Whether it touches any weight at all."""
        return self.low > 0 or self.high < math.inf

    @property
    def formula(self) -> str:
        """What multiplies the loss of a token, e.g. `min(ρ, 2)`."""
        weight = _SYMBOLS[self.level]
        if not self.masks:
            return f"min({weight}, {self.high:g})" if self.bounded else weight
        kept = f"{self.low:g} ≤ {weight} ≤ {self.high:g}" if self.low else f"{weight} ≤ {self.high:g}"
        return f"{'1' if self.level == 'geometric' else weight} if {kept}, else 0"

    @property
    def source(self) -> str:
        """Where it was published."""
        return _SOURCES[self.name]

    def outside(self, log_weights: Any) -> Any:
        """Which weights it caps or masks: booleans of the same shape, from logarithms, so that nothing overflows.

        Args:
            log_weights: log ρ, D, or D / T, nats; an array or a tensor.
        """
        low = math.log(self.low) if self.low else -math.inf
        return (log_weights > math.log(self.high)) | (log_weights < low)


_SOURCES = {
    "token-tis": "Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training; TRL, verl",
    "token-mis": "IcePop, Ling Team 2025; TRL, verl",
    "seq-is": "Qi et al., arXiv 2510.26788; unbiased",
    "seq-tis": "Liu et al. 2025, When Speed Kills Stability; TRL, verl",
    "seq-mis": "Liu et al. 2025, When Speed Kills Stability; TRL, verl",
    "geometric": "verl, rejection by seq_mean_k1",
}
CORRECTIONS: Mapping[str, Correction] = MappingProxyType(
    {
        found.name: found
        for found in (
            Correction("token-tis", "token truncated importance sampling", "token", 0.0, 2.0, False),
            Correction("token-mis", "token masked importance sampling", "token", 0.5, 5.0, True),
            Correction("seq-is", "sequence importance sampling", "sequence", 0.0, math.inf, False),
            Correction("seq-tis", "sequence truncated importance sampling", "sequence", 0.0, 3.0, False),
            Correction("seq-mis", "sequence masked importance sampling", "sequence", 0.0, 3.0, True),
            Correction("geometric", "sequences masked by their geometric mean", "geometric", 0.999, 1.001, True),
        )
    }
)
_BOUNDED = tuple(found for found in CORRECTIONS.values() if found.bounded)


def touched_shares(chunks: Iterable[PairArrays]) -> dict[str, MetricValue]:
    """By bounded correction, the share of usable tokens that it touches, with a prompt-clustered interval.

    Args:
        chunks: A pair, in parts that hold whole sequences; a sequence with an unusable token is left out.
    """
    hits: dict[str, NDArray[np.float64]] = {}
    counts: NDArray[np.float64] = np.zeros(0)
    for chunk in chunks:
        if not hits:
            counts = np.zeros(len(chunk.prompt_ids))
            hits = {correction.name: np.zeros(len(chunk.prompt_ids)) for correction in _BOUNDED}
        if not len(chunk.sequence):
            continue
        d = np.where(usable_rows(chunk), chunk.trainer_logprob - chunk.rollout_logprob, np.nan)
        n = np.bincount(chunk.sequence, minlength=len(chunk.prompt)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            total = np.bincount(chunk.sequence, weights=d, minlength=len(chunk.prompt))
        kept = np.isfinite(total[chunk.sequence])
        prompt = chunk.prompt[chunk.sequence]
        counts += np.bincount(prompt[kept], minlength=len(counts))
        with np.errstate(divide="ignore", invalid="ignore"):
            log_weight = {"token": d, "sequence": total[chunk.sequence], "geometric": (total / n)[chunk.sequence]}
        for correction in _BOUNDED:
            beyond = kept & correction.outside(log_weight[correction.level])
            hits[correction.name] += np.bincount(prompt[beyond], minlength=len(counts))
    return {name: _share(found, counts) for name, found in hits.items()}


def _share(hits: NDArray[np.float64], counts: NDArray[np.float64]) -> MetricValue:
    if counts.sum() == 0:
        return MetricValue(None, why="no sequence has usable log-probs throughout")
    share = float(hits.sum() / counts.sum())
    if share < _RARE:
        return MetricValue(share, *rare_share_interval(hits, counts))
    limits = share_interval(hits, counts, heavy_tailed=True)
    if limits is None:
        return MetricValue(share, why="no interval: a single prompt")
    return MetricValue(share, *limits)
