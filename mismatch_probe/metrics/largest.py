"""The tokens of a pair that differ most, found while its chunks pass by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.chunks import Ints
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.types import PairArrays

LARGEST_TOKENS = 5


@dataclass(frozen=True)
class LargestTokens:
    """The usable tokens with the largest |d|, largest first, of equal ones the earliest.

    Attributes:
        row: Index of each among the pair's tokens.
        sequence: Index of its sequence.
        position: Index in its response.
        rollout_logprob: b, nats.
        trainer_logprob: a, nats.
    """

    row: Ints
    sequence: Ints
    position: Ints
    rollout_logprob: Floats
    trainer_logprob: Floats

    @classmethod
    def of(cls, pair: PairArrays, usable: NDArray[np.bool_], first_row: int) -> LargestTokens:
        """Those of a chunk whose first token is the pair's token `first_row`.

        Args:
            pair: The chunk.
            usable: `[N]` which of its tokens count; at least one does.
            first_row: How many tokens the pair has before it.
        """
        with np.errstate(invalid="ignore"):
            size = np.where(usable, np.abs(pair.trainer_logprob - pair.rollout_logprob), -1.0)
        place = len(size) - min(LARGEST_TOKENS, int(np.count_nonzero(usable)))
        rows = np.flatnonzero(size >= np.partition(size, place)[place])
        rows = rows[np.argsort(-size[rows], kind="stable")][:LARGEST_TOKENS]
        return cls(
            row=rows + first_row,
            sequence=pair.sequence[rows],
            position=pair.position[rows],
            rollout_logprob=pair.rollout_logprob[rows],
            trainer_logprob=pair.trainer_logprob[rows],
        )

    def joined(self, later: LargestTokens) -> LargestTokens:
        """Those of both, of which `later` come after these in the pair."""
        columns = [np.concatenate(both) for both in zip(vars(self).values(), vars(later).values(), strict=True)]
        every = LargestTokens(*columns)
        order = np.argsort(-np.abs(every.trainer_logprob - every.rollout_logprob), kind="stable")[:LARGEST_TOKENS]
        return LargestTokens(*(column[order] for column in columns))

    @classmethod
    def none(cls) -> LargestTokens:
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing, nothing, np.empty(0), np.empty(0))
