"""Sums by prompt and by bin of a token property: mean |d|, share of d², and E[ρ] = 1 per bin all come from them.

Shape legend: `P` prompts, `K` bins, `n` tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import TokenChunk
from mismatch_probe.metrics.intervals import Floats

PROBABILITY_EDGES = np.array([0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
# The longest response is only known at the end: bins of one position up to here serve every equal width that a figure
# may choose, and beyond, an eighth of an octave is fine enough to choose from.
UNIT_POSITIONS = 96
_LONGEST = 1 << 24
POSITION_EDGES = np.unique(
    np.concatenate(
        [
            np.arange(UNIT_POSITIONS + 1.0),
            np.geomspace(UNIT_POSITIONS, _LONGEST, int(8 * np.log2(_LONGEST / UNIT_POSITIONS))).round(),
        ]
    )
)


class BinnedSums:
    """Sums over the tokens of each prompt in each bin [edges[k], edges[k+1]), the outer bins open-ended.

    Attributes:
        edges: `[K+1]`
        count: `[P, K]` tokens.
        abs_log_ratio: `[P, K]` Σ |d|, nats.
        squared_log_ratio: `[P, K]` Σ d².
        ratio_excess: `[P, K]` Σ (ρ − 1), times exp(−`shift`).
        shift: 0 unless ρ could overflow; a test of E[ρ] = 1 has no scale and can ignore it.
    """

    def __init__(self, edges: Floats, n_prompts: int) -> None:
        self.edges = edges
        self.shift = 0.0
        self._n_prompts = n_prompts
        # Grown with the largest bin seen: of the positions' many bins short responses need few.
        self._sums = np.zeros((4, n_prompts, 0))

    def update(self, tokens: TokenChunk, values: NDArray[Any]) -> None:
        """Takes in a chunk whose property is `values` `[n]`. Tokens whose property is NaN are in no bin."""
        known = ~np.isnan(values)
        keep: Any = slice(None) if known.all() else known
        values = values[keep]
        if len(values) == 0:
            return
        bins = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, len(self.edges) - 2)
        self._grow(int(bins.max()) + 1)
        width = self._sums.shape[2]
        cell = tokens.token_prompt[keep] * width + bins
        common = max(self.shift, scales.shift_of(tokens.log_ratio[keep]))
        self._sums[3] *= np.exp(self.shift - common)
        self.shift = common
        excess = tokens.ratio_excess(common)[keep]
        columns = (None, tokens.abs_log_ratio[keep], tokens.squared_log_ratio[keep], excess)
        for sums, column in zip(self._sums, columns, strict=True):
            sums += np.bincount(cell, column, minlength=sums.size).reshape(sums.shape)

    def _grow(self, width: int) -> None:
        missing = width - self._sums.shape[2]
        if missing > 0:
            self._sums = np.pad(self._sums, ((0, 0), (0, 0), (0, missing)))

    def merged(self, first: NDArray[np.int64], end: float) -> BinnedSums:
        """The same sums in wider bins, which begin at the bins `first` (increasing, from 0); the last ends at `end`."""
        whole = BinnedSums(np.append(self.edges[first], end), self._n_prompts)
        whole.shift = self.shift
        self._grow(int(first[-1]) + 1)
        whole._sums = np.add.reduceat(self._sums, first, axis=2)
        return whole

    def _column(self, index: int) -> Floats:
        self._grow(len(self.edges) - 1)
        return np.asarray(self._sums[index])

    @property
    def count(self) -> Floats:
        return self._column(0)

    @property
    def abs_log_ratio(self) -> Floats:
        return self._column(1)

    @property
    def squared_log_ratio(self) -> Floats:
        return self._column(2)

    @property
    def ratio_excess(self) -> Floats:
        return self._column(3)
