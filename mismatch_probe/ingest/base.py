"""What a reader hands on: a recorded run in columns.

Shape legend: `S` sequences, `N` response tokens of all sequences, `M` prompt tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.results.manifest import Source

Side = Literal["rollout", "trainer"]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Ragged(Generic[T]):
    """Lists of differing length in one flat array.

    Attributes:
        values: All lists one after another.
        offsets: `[S+1]` int64; list `i` is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: NDArray[T]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[T]:
        """List `index`, as a view.

        Raises:
            IndexError: `index` is not one of 0 … S−1.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[T]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[S]` int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class RecordedRun:
    """Sequences that another program sampled, in the order of its file, with the log-probs that it wrote down.

    Everything per response token shares the offsets of `response_token_ids`. Non-finite log-probs stay as they are.
    At least one side is there, and a side is there for all sequences or for none. Every sequence has a response token,
    and at least one token of the run is not masked.

    Attributes:
        prompt_token_ids: `[M]` int32; a prompt may be empty.
        response_token_ids: `[N]` int32.
        rollout_logprobs: `[N]` b_t = log μ(y_t) in nats, float32 or float64 as in the file; None when not recorded.
        trainer_logprobs: `[N]` a_t = log π(y_t) likewise.
        loss_mask: `[N]` bool, True for the tokens that count; None when all do.
        step: `[S]` int64, the training step, negative ones allowed; None when not recorded.
        prompt_ids: `[S]` names of the prompts: the file's own `prompt_id`, else a digest of the prompt's token ids, so
            that equal prompts are one cluster of an interval.
        sample_ids: `[S]` int32, running number of the sequence within its prompt.
        finish_reasons: `[S]` the file's own, empty where it gives none.
        rows: `[S]` int64, the sequence's line (JSONL) or row (parquet) in the file, from 1.
        source: Facts for a manifest.
    """

    prompt_token_ids: Ragged[np.int32]
    response_token_ids: Ragged[np.int32]
    rollout_logprobs: Ragged[np.floating[Any]] | None
    trainer_logprobs: Ragged[np.floating[Any]] | None
    loss_mask: Ragged[np.bool_] | None
    step: NDArray[np.int64] | None
    prompt_ids: tuple[str, ...]
    sample_ids: NDArray[np.int32]
    finish_reasons: tuple[str, ...]
    rows: NDArray[np.int64]
    source: Source

    def __len__(self) -> int:
        return len(self.response_token_ids)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides whose log-probs are recorded: one or both."""
        recorded: tuple[tuple[Side, object], ...] = (
            ("rollout", self.rollout_logprobs),
            ("trainer", self.trainer_logprobs),
        )
        return tuple(side for side, values in recorded if values is not None)
