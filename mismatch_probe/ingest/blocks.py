"""Rows as the accounting looks at them: whole sequences, put together until a block is worth the arithmetic.

Shape legend: `R` rows of a block, `N` response tokens of a block, `n` those that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.chunk import Chunk, Lists
from mismatch_probe.metrics.chunks import WEIGHT_VERSION, Side

Ints = NDArray[np.int64]
MOST_PLACES = 5
_SIDES: tuple[Side, ...] = ("rollout", "trainer")


@dataclass(frozen=True)
class Block:
    """Rows in the order of their files.

    Attributes:
        files: `[R]` name of the file that a row is of.
        rows: `[R]` row in the file, from 1.
        prompts: Prompt token ids.
        responses: Response token ids.
        steps: `[R]` training step, None where a row has none.
        sequence: `[n]` index of each token's row, increasing.
        position: `[n]` index of the token in its response.
        logprobs: `[n]` float64 log-probs by side that any row has, NaN where a row has none.
        recorded: `[n]` by the same sides, whether the row has them.
        weight_version: `[n]`, NaN where a row has none; None where no row has any.
    """

    files: NDArray[np.object_]
    rows: Ints
    prompts: Lists
    responses: Lists
    steps: list[Any]
    sequence: Ints
    position: Ints
    logprobs: dict[Side, NDArray[np.float64]]
    recorded: dict[Side, NDArray[np.bool_]]
    weight_version: NDArray[np.float64] | None

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Block:
        """Joins chunks, at least one."""
        lengths = np.concatenate([chunk.lists["response_token_ids"].lengths for chunk in chunks])
        n_rows, n_tokens = len(lengths), int(lengths.sum())
        sequence = np.repeat(np.arange(n_rows), lengths)
        position = np.arange(n_tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        mask = _column(chunks, "loss_mask", lengths)
        counted = None if mask is None else np.isnan(mask) | (mask != 0)
        kept = slice(None) if counted is None or counted.all() else np.flatnonzero(counted)
        logprobs: dict[Side, NDArray[np.float64]] = {}
        recorded: dict[Side, NDArray[np.bool_]] = {}
        for side in _SIDES:
            values = _column(chunks, f"{side}_logprobs", lengths)
            if values is not None:
                logprobs[side] = values[kept]
                fits = _lengths(chunks, f"{side}_logprobs") == lengths
                recorded[side] = np.ones(len(logprobs[side]), bool) if fits.all() else fits[sequence[kept]]
        version = _column(chunks, WEIGHT_VERSION, lengths)
        return cls(
            files=np.array([place.name for chunk in chunks for place in chunk.places], object),
            rows=np.concatenate([chunk.rows for chunk in chunks]),
            prompts=_joined(chunks, "prompt_token_ids"),
            responses=_joined(chunks, "response_token_ids"),
            steps=[step for chunk in chunks for step in chunk.scalars.get("step", [None] * len(chunk.rows))],
            sequence=sequence[kept],
            position=position[kept],
            logprobs=logprobs,
            recorded=recorded,
            weight_version=None if version is None else version[kept],
        )

    @cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """`[R]` positions of the first and the last token of a row that count; of no meaning where none does."""
        first, last = np.zeros((2, len(self.rows)), np.int64)
        start = np.flatnonzero(np.diff(self.sequence, prepend=-1))
        end = np.append(start[1:], len(self.sequence)) - 1
        rows = self.sequence[start]
        first[rows], last[rows] = self.position[start], self.position[end[: len(start)]]
        return first, last

    def row_place(self, row: int) -> str:
        """Where a row stands: `step_3.jsonl:12`."""
        return f"{self.files[row]}:{self.rows[row]}"

    def token_place(self, token: int) -> str:
        """Where a token that counts stands: `step_3.jsonl:12[7]`."""
        return f"{self.row_place(int(self.sequence[token]))}[{self.position[token]}]"


def _joined(chunks: Sequence[Chunk], key: str) -> Lists:
    columns = [chunk.lists[key] for chunk in chunks]
    return Lists(np.concatenate([c.values for c in columns]), np.concatenate([c.lengths for c in columns]))


def _lengths(chunks: Sequence[Chunk], key: str) -> Ints:
    absent = (chunk.lists[key].lengths if key in chunk.lists else np.full(len(chunk.rows), -1) for chunk in chunks)
    return np.concatenate(list(absent))


def _column(chunks: Sequence[Chunk], key: str, lengths: Ints) -> NDArray[np.float64] | None:
    """`[N]` float64 values of a key, NaN in rows whose list does not run along the response; None without any."""
    parts = [chunk.lists[key].values for chunk in chunks if key in chunk.lists]
    if not parts:
        return None
    values: NDArray[np.float64] = np.concatenate(parts).astype(np.float64, copy=False)
    own = _lengths(chunks, key)
    if np.array_equal(own, lengths):
        return values
    fits = own == lengths
    filled = np.full(int(lengths.sum()), np.nan)
    filled[np.repeat(fits, lengths)] = values[np.repeat(fits, np.maximum(own, 0))]
    return filled


class Tally:
    """Tokens or rows that something holds of: how many, in how many rows, and where the first ones stand."""

    def __init__(self) -> None:
        self.n = self.n_rows = 0
        self.places: list[str] = []

    def add(self, block: Block, tokens: Ints) -> None:
        """Takes in tokens of a block `[k]`, increasing."""
        if len(tokens):
            self.n += len(tokens)
            self.n_rows += 1 + int(np.count_nonzero(np.diff(block.sequence[tokens])))
            self.places += [block.token_place(int(token)) for token in tokens[: MOST_PLACES - len(self.places)]]

    def add_rows(self, block: Block, rows: Ints) -> None:
        """Takes in rows of a block `[k]`."""
        self.n += len(rows)
        self.n_rows += len(rows)
        self.places += [block.row_place(row) for row in rows[: MOST_PLACES - len(self.places)].tolist()]

    def add_row(self, place: str, tokens: int = 1) -> None:
        """Takes in a row, with the number of its tokens."""
        self.n += tokens
        self.n_rows += 1
        if len(self.places) < MOST_PLACES:
            self.places.append(place)
