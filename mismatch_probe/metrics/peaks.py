"""Largest activations, streamed: maxima and tail quantiles by tensor, by context length, first tokens apart.

The first token of a sequence often carries activations hundreds of times larger than any other (an attention sink; Sun
et al. 2024, "Massive Activations in Large Language Models"), so it never stands in for the rest.

Shape legend: `M` tensors, `T` tokens of a sequence, `C` bins of context length, `B` bins of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.floats import FP16

Floats = NDArray[np.float64]
# Positions 0, 1, 2–3, 4–7, …: a bin an octave.
CONTEXT_BINS = 32
_PER_OCTAVE = 8
_LOWEST, _HIGHEST = -40, 128
_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2


@dataclass
class PeakSums:
    """Statistics of each tensor's token peaks: max |x| over the channels of a token.

    Attributes:
        names: `M` tensors, in the order in which a forward pass makes them.
        first: `[M]` the largest peak of a sequence's first token.
        rest: `[M]` of all other tokens.
        by_context: `[M, C]` the largest peak at positions of an octave; 0 where none was seen.
        histogram: `[M, B]` tokens other than first ones, by log2 of their peak.
        n_overflow, n_nonfinite: `[M]` tokens, first ones included, with a peak that FP16 rounds to infinity, and that
            was not finite to begin with.
        at: `[M, 2]` index of the sequence and position of the largest peak.
        overflow_by_sequence: Of each sequence, tokens with an overflow in any tensor that counts.
        lengths: Tokens of each sequence.
    """

    names: tuple[str, ...]
    first: Floats = field(init=False)
    rest: Floats = field(init=False)
    by_context: Floats = field(init=False)
    histogram: NDArray[np.int64] = field(init=False)
    n_overflow: NDArray[np.int64] = field(init=False)
    n_nonfinite: NDArray[np.int64] = field(init=False)
    at: NDArray[np.int64] = field(init=False)
    overflow_by_sequence: list[int] = field(init=False, default_factory=list)
    lengths: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        m = len(self.names)
        self.first, self.rest = np.zeros(m), np.zeros(m)
        self.by_context = np.zeros((m, CONTEXT_BINS))
        self.histogram = np.zeros((m, _BINS), np.int64)
        self.n_overflow, self.n_nonfinite = np.zeros(m, np.int64), np.zeros(m, np.int64)
        self.at = np.zeros((m, 2), np.int64)

    def update(self, peaks: Floats, counted: NDArray[np.bool_], placed: NDArray[np.bool_]) -> None:
        """Adds a sequence.

        Args:
            peaks: `[M, T]` token peaks; a tensor that is not placed has its one peak at every position.
            counted: `[M]` tensors whose overflows make a token one with an overflow.
            placed: `[M]` whether a tensor's peaks belong to tokens. One that does not has no part in first tokens,
                positions and quantiles; it counts as one token, and its `at` has the position −1.
        """
        finite = np.isfinite(peaks)
        values = np.where(finite, peaks, 0.0)
        each = np.where(placed, peaks.shape[1], 1)
        over = ~finite | (values >= FP16.overflows_from)
        self.n_nonfinite += np.minimum((~finite).sum(1), each)
        self.n_overflow += np.minimum(over.sum(1), each)
        tokens = over[counted & placed].any(0).sum()
        self.overflow_by_sequence.append(int(max(tokens, over[counted].any())))
        largest = values.max(1)
        where = np.where(placed, values.argmax(1), -1)
        grown = largest > self.largest
        self.at[grown] = np.stack([np.full(len(largest), len(self.lengths)), where], axis=1)[grown]
        self.first[placed] = np.maximum(self.first, values[:, 0])[placed]
        self.rest[~placed] = np.maximum(self.rest, largest)[~placed]
        bins = np.frexp(np.arange(values.shape[1], dtype=np.float64))[1]
        for index in np.unique(bins):
            seen = np.maximum(self.by_context[:, index], values[:, bins == index].max(1))
            self.by_context[placed, index] = seen[placed]
        if values.shape[1] > 1:
            rest = values[placed, 1:]
            self.rest[placed] = np.maximum(self.rest[placed], rest.max(1))
            rows = np.flatnonzero(placed)[:, None]
            np.add.at(self.histogram, (np.broadcast_to(rows, rest.shape), _bin_of(rest)), 1)
        self.lengths.append(peaks.shape[1])

    def widened(self, names: tuple[str, ...]) -> PeakSums:
        """These sums with further tensors behind, which only a later sequence made; itself where there are none."""
        if names == self.names:
            return self
        wider, n = PeakSums(names), len(self.names)
        for name, array in self.arrays().items():
            found = getattr(wider, name)
            if isinstance(found, list):
                found.extend(array.tolist())
            else:
                found[:n] = array
        return wider

    @property
    def largest(self) -> Floats:
        """`[M]` the largest finite peak of any token."""
        return np.maximum(self.first, self.rest)

    def quantile(self, level: float) -> Floats:
        """`[M]` quantile of the peaks of tokens other than first ones, within 9 %: the upper end of its bin."""
        counts = self.histogram.cumsum(1)
        total = counts[:, -1:]
        index = (counts < level * total).sum(1)
        upper = np.exp2(_LOWEST + np.minimum(index, _BINS - 1) / _PER_OCTAVE)
        return np.where(total[:, 0] > 0, np.minimum(np.where(index == 0, 0.0, upper), self.rest), 0.0)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For a file."""
        named = ("first", "rest", "by_context", "histogram", "n_overflow", "n_nonfinite", "at")
        lists = ("overflow_by_sequence", "lengths")
        return {name: getattr(self, name) for name in named} | {n: np.array(getattr(self, n), np.int64) for n in lists}

    @classmethod
    def of_arrays(cls, names: tuple[str, ...], arrays: dict[str, NDArray[Any]]) -> PeakSums:
        """From what `arrays` gave."""
        sums = cls(names)
        for name, array in sums.arrays().items():
            kept = isinstance(getattr(sums, name), list)
            setattr(sums, name, arrays[name].tolist() if kept else arrays[name].astype(array.dtype))
        return sums


def context_of(index: int) -> tuple[int, int]:
    """First and last position of a bin of `PeakSums.by_context`."""
    return (0, 0) if index == 0 else (1 << (index - 1), (1 << index) - 1)


def _bin_of(values: Floats) -> NDArray[np.int64]:
    """Bins of width 1/8 octave; 0 for what is smaller than them all."""
    with np.errstate(divide="ignore"):
        logs = np.log2(values)
    return np.asarray(np.clip(np.ceil((logs - _LOWEST) * _PER_OCTAVE), 0, _BINS - 1), dtype=np.int64)
