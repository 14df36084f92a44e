"""A number per token, kept part by part, on the disk where they are many: sums over runs and order statistics.

Shape legend: `n` values, `m` those of a part, `S` runs of values, `R` ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.files import writing
from mismatch_probe.metrics.inference import Floats

_IN_MEMORY = 1 << 25
"""Bytes up to which a scratch file is none."""
_SORTED = 1 << 22
"""Values that are sorted at once."""
_KEY_BITS = 20
"""Leading bits of a float64 by which more values are counted first."""
Ints = NDArray[np.int64]
OfPart = Callable[[Floats], NDArray[Any]]


class Scratch:
    """A file without a name for parts of columns; it vanishes with the process.

    Args:
        folder: On whose disk it lies once it is large.
    """

    def __init__(self, folder: Path) -> None:
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder))  # noqa: SIM115
        self._folder, self._end = folder, 0
        weakref.finalize(self, self._file.close)

    def put(self, values: Floats) -> tuple[int, int]:
        """Writes `[m]` values; returns where they are.

        Raises:
            DiskFull: No space is left on the device.
            TableError: The folder cannot be written.
        """
        with writing(self._folder):
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(values).data)
        place = self._end, values.nbytes
        self._end += values.nbytes
        return place

    def get(self, start: int, size: int) -> Floats:
        """The values at a place, read-only."""
        self._file.seek(start)
        return np.frombuffer(self._file.read(size), np.float64)


class Column:
    """Values in the order of their tokens, none of them NaN.

    Args:
        scratch: Where its parts lie; None for memory.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        self._scratch, self._n = scratch, 0
        self._parts: list[Floats | tuple[int, int]] = []

    @classmethod
    def of(cls, values: Floats) -> Column:
        """`[n]` values that are in memory."""
        column = cls()
        column.append(values)
        return column

    def append(self, values: Floats) -> None:
        """Adds a part `[m]`."""
        self._parts.append(values if self._scratch is None else self._scratch.put(values))
        self._n += len(values)

    def __len__(self) -> int:
        return self._n

    def parts(self) -> Iterator[Floats]:
        """The parts `[m]` in their order."""
        for part in self._parts:
            if isinstance(part, tuple):
                assert self._scratch is not None
                yield self._scratch.get(*part)
            else:
                yield part

    def whole(self, of: OfPart | None = None) -> Floats:
        """What `of` makes of the values, the values themselves without, as one new array."""
        return np.concatenate([np.empty(0), *(part if of is None else of(part) for part in self.parts())])

    def largest(self, of: OfPart) -> float:
        """The largest of what `of` makes of n ≥ 1 values."""
        return max(float(of(part).max()) for part in self.parts() if len(part))

    def run_sums(self, of: OfPart, length: Ints) -> Floats:
        """`[S]` sums of what `of` makes of the values, `[m]` of a part, over runs of `length` `[S]` that add up to n.

        No run lies in two parts, so that a sum does not depend on them.
        """
        sums = np.zeros(len(length))
        some = np.flatnonzero(length)
        end = np.cumsum(length[some])
        first = done = 0
        for part in self.parts():
            last = int(np.searchsorted(end, done + len(part), side="right"))
            if last > first:
                runs = some[first:last]
                sums[runs] = run_sums(of(part), end[first:last] - length[runs] - done)
            first, done = last, done + len(part)
        return sums

    def ranked(self, ranks: Ints, of: OfPart | None = None) -> tuple[Floats, Ints]:
        """Order statistics of what `of` makes of the values, of the values themselves without.

        Args:
            ranks: `[R]` places in the sorted values, from 0.
            of: What makes `[m]` values of those of a part.

        Returns:
            `[R]` the values at these places, and `[R]` how many of all are smaller.
        """
        if len(self) <= _SORTED:
            ordered = self.whole(of)
            ordered.sort()
            values = ordered[ranks]
            return values, np.searchsorted(ordered, values, side="left")
        n_keys = 1 << _KEY_BITS
        per_key: Ints = np.zeros(n_keys, np.int64)
        for part in self.parts():
            per_key += np.bincount(_keys(part if of is None else of(part)), minlength=n_keys)
        below = np.cumsum(per_key) - per_key
        key = np.searchsorted(below + per_key, ranks, side="right")
        values, smaller = np.empty(len(ranks)), np.empty(len(ranks), np.int64)
        for keys in _shares(np.unique(key), per_key):
            here = np.isin(key, keys)
            distinct, counts = self._distinct(keys, of)
            # Places among the values of these keys alone.
            before = np.zeros(n_keys, np.int64)
            before[keys] = below[keys] - (np.cumsum(per_key[keys]) - per_key[keys])
            last = np.cumsum(counts)
            at = np.searchsorted(last, ranks[here] - before[key[here]], side="right")
            values[here], smaller[here] = distinct[at], last[at] - counts[at] + before[key[here]]
        return values, smaller

    def _distinct(self, keys: Ints, of: OfPart | None) -> tuple[Floats, Ints]:
        """The distinct values with one of these keys, increasing, and how often each occurs."""
        wanted = np.zeros(1 << _KEY_BITS, np.bool_)
        wanted[keys] = True
        found = []
        for part in self.parts():
            values = part if of is None else of(part)
            found.append(np.unique(values[wanted[_keys(values)]], return_counts=True))
        values, counts = (np.concatenate(column) for column in zip(*found, strict=True))
        distinct, index = np.unique(values, return_inverse=True)
        return distinct, np.bincount(index, counts).astype(np.int64)

    def quantiles(self, levels: Sequence[float], of: OfPart | None = None) -> tuple[float, ...]:
        """What `np.quantile` gives of what `of` makes of n ≥ 1 values, bit for bit."""
        places = (len(self) - 1) * np.asarray(levels, np.float64)
        below = np.floor(places)
        first = below.astype(np.int64)
        both = np.concatenate([first, np.minimum(first + 1, len(self) - 1)])
        low, high = np.split(self.ranked(both, of)[0], 2)
        share, step = places - below, high - low
        found = np.where(share >= 0.5, high - step * (1 - share), low + step * share)
        return tuple(found.tolist())

    def distinct_from(self, smallest: float, of: OfPart) -> Floats:
        """The distinct values, of those that `of` makes, that are not below `smallest`, increasing."""
        found = [np.empty(0)]
        for part in self.parts():
            values = of(part)
            found.append(np.unique(values[values >= smallest]))
        return np.unique(np.concatenate(found))


def _keys(values: Floats) -> Ints:
    """`[m]` the leading bits of values, as numbers that sort as the values do."""
    bits = (values + 0.0).view(np.int64)  # which makes −0 a 0
    return np.asarray((np.where(bits < 0, ~bits, bits | (-1 << 63)).view(np.uint64) >> (64 - _KEY_BITS)).view(np.int64))


def _shares(keys: Ints, per_key: Ints) -> Iterator[Ints]:
    """The keys in shares of neighbours with so few values that they can be sorted at once; one key at least."""
    total = np.cumsum(per_key[keys])
    first = 0
    while first < len(keys):
        reached = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, reached + _SORTED, side="right")))
        yield keys[first:last]
        first = last


def run_sums(values: NDArray[Any], start: Ints) -> Floats:
    """`[S]` float64 sums of the runs of `values` `[n]` that begin at `start` `[S]`, increasing from 0."""
    if values.dtype == np.bool_:  # ten times as fast as sums of converted values, and as exact
        return np.add.reduceat(values.view(np.uint8), start, dtype=np.int64).astype(np.float64)
    return np.add.reduceat(values, start, dtype=np.float64)
