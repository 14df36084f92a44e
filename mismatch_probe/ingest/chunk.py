"""Rows of a file as flat arrays.

Shape legend: `R` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import Place


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
        """The lists of the rows where the `[R]` mask is True."""
        return Lists(self.values[np.repeat(rows, np.maximum(self.lengths, 0))], self.lengths[rows])

    @property
    def offsets(self) -> NDArray[np.int64]:
        """`[R+1]`; list `i` is `values[offsets[i]:offsets[i + 1]]`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(self.lengths, 0))])


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Attributes:
        place: The file.
        rows: `[R]` int64, where they stand in it, from 1.
        lists: By key of `IDS` and `PER_TOKEN`; those of `IDS` are always there and have a list in every row.
        scalars: By key of `PER_ROW`, `R` values each, None where a row has none.
        names: All keys that were found there, for messages.
    """

    place: Place
    rows: NDArray[np.int64]
    lists: dict[str, Lists]
    scalars: dict[str, list[Any]]
    names: Collection[str]

    @property
    def file(self) -> str:
        """Its name."""
        return self.place.name

    def keep(self, rows: NDArray[np.bool_]) -> Chunk:
        """The rows where the `[R]` mask is True."""
        if rows.all():
            return self
        return Chunk(
            self.place,
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
