"""What is kept of rows of logits, so that log-probs follow under any temperature, truncation and penalty.

Shape legend: `R` rows, `V` vocabulary, `G` temperatures, `K` likeliest tokens, `U` distinct ids of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.metrics.hypotheses import INVERSE_TEMPERATURES, MOST_TOP, STEP, distinct_ids
from mismatch_probe.types import ScoreRequest

_LEAST = 1e-30
_LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class RowFacts:
    """The facts of a batch's response tokens.

    Args:
        batch: Sequences that are scored together.
    """

    def __init__(self, batch: Sequence[ScoreRequest]) -> None:
        self._batch = batch
        self._ends = np.cumsum([len(request.response_token_ids) for request in batch])

    @torch.inference_mode()
    def of(self, engine: TrainerEngine) -> Iterator[tuple[int, Mapping[str, NDArray[Any]]]]:
        """Each sequence's id with its facts, see `metrics.hypotheses.Rows`."""
        parts: dict[int, list[Mapping[str, NDArray[Any]]]] = {}
        for start, logits, targets in engine.rows(self._batch):
            for index, rows in self._pieces(start, len(targets)):
                ids = torch.as_tensor(self._distinct(index), device=logits.device)
                found = facts(logits[rows], targets[rows], ids)
                parts.setdefault(index, []).append({name: value.cpu().numpy() for name, value in found.items()})
        for index, some in parts.items():
            yield self._batch[index].sequence_id, {name: np.concatenate([p[name] for p in some]) for name in some[0]}

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, slice]]:
        """Sequences that a chunk of rows has rows of, and which."""
        at = 0
        while at < count:
            index = int(np.searchsorted(self._ends, start + at, side="right"))
            end = min(count, int(self._ends[index]) - start)
            yield index, slice(at, end)
            at = end

    def _distinct(self, index: int) -> NDArray[np.int64]:
        request = self._batch[index]
        return distinct_ids(request.prompt_token_ids, request.response_token_ids)


def facts(logits: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Facts `[R, …]` of rows `[R, V]` with their tokens `[R]`, and of a sequence's distinct ids `[U]`."""
    at = targets[:, None]
    chosen = logits.gather(1, at)[:, 0]
    normaliser, slope = normalisers(logits)
    rest = logits.clone()
    rest[:, ids] = -torch.inf
    found = {
        "logprob": chosen - logits.logsumexp(1),
        "chosen": chosen,
        "normaliser": normaliser,
        "slope": slope,
        "top": logits.topk(min(MOST_TOP, logits.shape[1]), 1).values,
        "distinct": logits[:, ids],
        "rest": rest.logsumexp(1),
    }
    for name, dtype in _LOW.items():
        low = logits.to(dtype)
        found[f"rounded_{name}"] = low.log_softmax(1).gather(1, at)[:, 0].float()
        found[f"subtracted_{name}"] = (low.gather(1, at)[:, 0] - low.logsumexp(1)).float()
    return found


def normalisers(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp(βx) `[R, G]` of rows `[R, V]` at `INVERSE_TEMPERATURES`, and its slope in β.

    Inverse temperatures are multiples of the first step, so that one exponential per logit is enough.
    """
    top = logits.amax(1, keepdim=True)
    below = logits - top
    step = (STEP * below).exp_()
    power, reached = step.clone(), 1
    totals, slopes = [], []
    for beta in INVERSE_TEMPERATURES:
        for _ in range(round(beta / STEP) - reached):
            power.mul_(step)
        reached = round(beta / STEP)
        total = power.sum(1)
        totals.append(total.log() + beta * top[:, 0])
        slopes.append(torch.linalg.vecdot(power, below) / total + top[:, 0])
    return torch.stack(totals, 1), torch.stack(slopes, 1)
