"""Rows on their way from a reader into a run, and the rules that every row obeys, whatever format it came from.

Readers check what only they can know (syntax, the types of values); lengths, ranges and presence are checked here, on
whole arrays. Shape legend: `R` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import Side
from mismatch_probe.ingest.refusal import Place, kind, wrong_length

IDS = ("prompt_token_ids", "response_token_ids")
LOGPROBS: dict[str, Side] = {"rollout_logprobs": "rollout", "trainer_logprobs": "trainer"}
PER_TOKEN = (*LOGPROBS, "loss_mask")
LISTS = (*IDS, *PER_TOKEN)
SCALARS = ("step", "prompt_id", "finish_reason")
KEYS = frozenset({*LISTS, *SCALARS})
# In every row or in none; a finish reason may be missing anywhere, for nothing is computed from it.
UNIFORM = (*PER_TOKEN, "step", "prompt_id")
LARGEST_ID = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Lists:
    """A list column: all its values in a row, and `[R]` int64 lengths, −1 where a row has no list."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    def locate(self, index: int) -> tuple[int, int]:
        """The row in which `values[index]` lies, and its place in that row's list."""
        ends = np.cumsum(np.maximum(self.lengths, 0))
        row = int(np.searchsorted(ends, index, side="right"))
        return row, index - int(ends[row - 1] if row else 0)

    def keep(self, rows: NDArray[np.bool_]) -> Lists:
        return Lists(self.values[np.repeat(rows, np.maximum(self.lengths, 0))], self.lengths[rows])


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Attributes:
        rows: `[R]` int64, where they stand in the file, from 1.
        lists: By key of `LISTS`; the two of `IDS` are always there and have a list in every row.
        scalars: By key of `SCALARS`, `R` values each, None where a row has none.
        names: All keys or columns that were found there, for messages.
    """

    rows: NDArray[np.int64]
    lists: dict[str, Lists]
    scalars: dict[str, list[Any]]
    names: Collection[str]

    def keep(self, rows: NDArray[np.bool_]) -> Chunk:
        """The rows where the `[R]` mask is True."""
        if rows.all():
            return self
        return Chunk(
            self.rows[rows],
            {key: column.keep(rows) for key, column in self.lists.items()},
            {key: [v for v, kept in zip(column, rows, strict=True) if kept] for key, column in self.scalars.items()},
            self.names,
        )

    def present(self, key: str) -> NDArray[np.bool_]:
        """`[R]` bool, whether a row has a value of a key."""
        if key in self.lists:
            return self.lists[key].lengths >= 0
        return np.array([value is not None for value in self.scalars.get(key, [None] * len(self.rows))], bool)


def check_values(place: Place, chunk: Chunk) -> None:
    """Token ids lie in 0 … 2³¹−1, masks hold 0 and 1 only, and what is per token is as long as the response.

    Raises:
        IngestError: One does not; its row is named.
    """
    for key in IDS:
        values = chunk.lists[key].values
        fix = "Write the ids that the model saw, without padding."
        _refuse_first(place, chunk, key, (values < 0) | (values > LARGEST_ID), f"is outside 0 to {LARGEST_ID}", fix)
    prompts, responses = (chunk.lists[key].lengths for key in IDS)
    for key in PER_TOKEN:
        if key not in chunk.lists:
            continue
        lengths = chunk.lists[key].lengths
        wrong = np.flatnonzero((lengths >= 0) & (lengths != responses))
        if len(wrong):
            row = int(wrong[0])
            length, prompt, response = (int(each[row]) for each in (lengths, prompts, responses))
            place.refuse(int(chunk.rows[row]), *wrong_length(key, length, prompt, response))
    if "loss_mask" in chunk.lists:
        values = chunk.lists["loss_mask"].values
        fix = "Write one 0 or 1 per response token."
        _refuse_first(place, chunk, "loss_mask", (values != 0) & (values != 1), "is neither 0 nor 1", fix)


def _refuse_first(place: Place, chunk: Chunk, key: str, bad: NDArray[np.bool_], what: str, fix: str) -> None:
    if not bad.any():
        return
    index = int(np.argmax(bad))
    row, position = chunk.lists[key].locate(index)
    value = chunk.lists[key].values[index]
    place.refuse(int(chunk.rows[row]), f"has {value} as {key}[{position}], which {what}", fix)


def check_step(place: Place, row: int, value: Any) -> int | None:
    """A training step: an integer of 64 bits.

    Raises:
        IngestError: It is something else.
    """
    if value is not None and (type(value) is not int or not -(2**63) <= value < 2**63):
        place.refuse(row, f"has a step that is {kind(value)}, not a 64-bit integer", "Write the step as an integer.")
    return value


def check_label(place: Place, row: int, key: str, value: Any) -> str | None:
    """A name: text, or an integer, which is written out.

    Raises:
        IngestError: It is something else, or text that cannot be encoded.
    """
    if value is None:
        return None
    if type(value) not in (str, int):
        place.refuse(row, f"has a {key} that is {kind(value)}", f"Write {key} as text.")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        # JSON can spell half of a surrogate pair, which no table takes.
        place.refuse(row, f"has a {key} with an unpaired surrogate escape", "Write the character or both surrogates.")
    return text
