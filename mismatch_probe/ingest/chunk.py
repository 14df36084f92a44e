"""Rows as flat arrays.

Shape legend: `R` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import Place


@dataclass(frozen=True)
class Lists:
    """A list column: all its values in a row, and `[R]` int64 lengths, −1 where a row has no list."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    def first(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int, Any]]:
        """Of each row where the mask along `values` is True: row, place in its list, and value, the first of each."""
        found = np.flatnonzero(wanted)
        rows, firsts = np.unique(np.searchsorted(self.offsets[1:], found, side="right"), return_index=True)
        for row, index in zip(rows.tolist(), found[firsts].tolist(), strict=True):
            yield row, index - int(self.offsets[row]), self.values[index]

    def keep(self, rows: NDArray[np.bool_]) -> Lists:
        """The lists of the rows where the `[R]` mask is True."""
        return Lists(self.values[np.repeat(rows, np.maximum(self.lengths, 0))], self.lengths[rows])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """`[R+1]`; list `i` is `values[offsets[i]:offsets[i + 1]]`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(self.lengths, 0))])


@dataclass(frozen=True)
class Chunk:
    """Some rows.

    Attributes:
        places: The file of each row.
        rows: `[R]` int64, where they stand in it, from 1.
        lists: By key of `IDS` and `PER_TOKEN`; those of `IDS` are always there and have a list in every row.
        scalars: By key of `PER_ROW`, `R` values each, None where a row has none.
    """

    places: list[Place]
    rows: NDArray[np.int64]
    lists: dict[str, Lists]
    scalars: dict[str, list[Any]]

    def refuse(self, row: int, what: str, fix: str) -> NoReturn:
        """Ends the reading at a row of the chunk, counted from 0."""
        self.places[row].refuse(int(self.rows[row]), what, fix)

    def keep(self, rows: NDArray[np.bool_]) -> Chunk:
        """The rows where the `[R]` mask is True."""
        if rows.all():
            return self
        return Chunk(
            list(compress(self.places, rows)),
            self.rows[rows],
            {key: column.keep(rows) for key, column in self.lists.items()},
            {key: list(compress(column, rows)) for key, column in self.scalars.items()},
        )

    def present(self, key: str) -> NDArray[np.bool_]:
        """`[R]` bool, whether a row has a value of a key."""
        if key in self.lists:
            return self.lists[key].lengths >= 0
        return np.array([value is not None for value in self.scalars.get(key, [None] * len(self.rows))], bool)
