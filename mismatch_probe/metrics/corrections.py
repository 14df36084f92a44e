"""What each rollout correction would touch: the share of tokens whose weight it caps, or that it masks.

A correction weights a token by ρ = exp(d) or a sequence by w = exp(D), or keeps a sequence by its geometric mean
exp(D / T), all of trainer over rollout. Names and bounds are those of the paper (arXiv 2510.26788) and of TRL and verl.

Shape legend: `N` tokens, `S` sequences, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.chunks import usable_rows
from mismatch_probe.metrics.intervals import rare_share_interval, share_interval
from mismatch_probe.types import MetricValue, PairArrays

_RARE = 0.01


@dataclass(frozen=True)
class Correction:
    """A correction with its bounds.

    Attributes:
        name: Short.
        title: In words.
        level: Whose weight is bounded: a token's, a sequence's, or a sequence's geometric mean.
        low, high: Bounds of the weight, beyond which it is capped or masked.
        masks: Whether what lies beyond is masked rather than capped.
    """

    name: str
    title: str
    level: Literal["token", "sequence", "geometric"]
    low: float
    high: float
    masks: bool


CORRECTIONS = (
    Correction("token-tis", "token truncated importance sampling", "token", 0.0, 2.0, False),
    Correction("token-mis", "token masked importance sampling", "token", 0.5, 5.0, True),
    Correction("seq-tis", "sequence truncated importance sampling", "sequence", 0.0, 3.0, False),
    Correction("seq-mis", "sequence masked importance sampling", "sequence", 0.0, 3.0, True),
    Correction("geometric", "sequences masked by their geometric mean", "geometric", 0.999, 1.001, True),
)


def touched_shares(chunks: Iterable[PairArrays]) -> dict[str, MetricValue]:
    """By correction, the share of usable tokens that it touches, with a prompt-clustered interval.

    Args:
        chunks: A pair, in parts that hold whole sequences; a sequence with an unusable token is left out.
    """
    hits: dict[str, NDArray[np.float64]] = {}
    counts: NDArray[np.float64] = np.zeros(0)
    for chunk in chunks:
        if not hits:
            counts = np.zeros(len(chunk.prompt_ids))
            hits = {correction.name: np.zeros(len(chunk.prompt_ids)) for correction in CORRECTIONS}
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
        for correction in CORRECTIONS:
            low = math.log(correction.low) if correction.low else -math.inf
            values = log_weight[correction.level]
            beyond = kept & ((values > math.log(correction.high)) | (values < low))
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
