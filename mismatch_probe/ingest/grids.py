"""The grid on which one side's log-probs lie, where it is coarser than float32.

A value is judged where its size makes it tell: below `NEAR_CERTAIN` and where the step of the grid is at least four
times the spacing of what stores it. Placeholders and constants are left out. 999 of 1,000 values must lie on the grid,
of at least 100, and at least 16 of the first 65,536 must be distinct. A float32 value lies within 8 units of a bfloat16
one by chance in 17 of 65,536 cases, of a float16 one in 17 of 8,192, and within its spacing of a decimal in at most one
of two, so that chance never does it. float64 that holds float32 values is not a grid.

Shape legend: `n` tokens that count, `k` those that are judged.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.chunks import Side
from mismatch_probe.metrics.constants import BFLOAT16_BITS, FLOAT16_BITS, NEAR_CERTAIN, on_binary_grid
from mismatch_probe.results.finding import Finding, Severity

Floats = NDArray[np.float64]
Grid = Literal["bfloat16", "float16", "logits", "decimals"]
ENOUGH = 100
_ENOUGH_DISTINCT = 16
_SHARE = 0.999
_SAMPLE = 1 << 16
_DECIMALS = 6
# A grid that leaves more than this share of the gap to rounding cannot show it.
_VISIBLE = 0.1
_LOGIT_STEPS = tuple(2.0**-power for power in range(2, 8))


class GridCount:
    """How many of one side's values lie on each grid."""

    def __init__(self) -> None:
        self._n = self._n_decimal = 0
        self._on = {BFLOAT16_BITS: 0, FLOAT16_BITS: 0}
        self._on_decimal = 0
        self._sample: list[Floats] = []
        self._sampled = 0

    def add(self, values: Floats) -> None:
        """Takes in log-probs `[n]` in their order, without placeholders."""
        judged = values[values <= NEAR_CERTAIN]
        self._n += len(judged)
        for bits in self._on:
            self._on[bits] += int(np.count_nonzero(on_binary_grid(judged, bits)))
        tells, on = _on_decimals(judged, _DECIMALS)
        self._n_decimal += int(np.count_nonzero(tells))
        self._on_decimal += int(np.count_nonzero(on))
        if self._sampled < _SAMPLE:
            self._sample.append(judged[: _SAMPLE - self._sampled].copy())
            self._sampled += len(self._sample[-1])

    def finding(self, side: Side, gap: float | None) -> Finding | None:
        """The grid, where there is one.

        Args:
            side: Whose values.
            gap: Mean |d| of the pair, nats; None where the other side is not recorded.
        """
        sample = np.concatenate([*self._sample, np.empty(0)])
        if self._n < ENOUGH or len(np.unique(sample)) < _ENOUGH_DISTINCT:
            return None
        found = self._grid(sample)
        if found is None:
            return None
        grid, step, digits = found
        values = {
            "side": side,
            "grid": grid,
            "digits": digits,
            "step": step,
            "gap": gap,
            "step_over_gap": step / gap if gap else None,
            "n": self._n,
        }
        return Finding(code="coarse-grid", severity=_severity(step, gap), where=side, values=values)

    def _grid(self, sample: Floats) -> tuple[Grid, float, int] | None:
        """Kind, step in nats and bits or decimals of the coarsest grid that has the values."""
        size = float(np.median(-sample))
        binary: tuple[tuple[Grid, int], ...] = (("bfloat16", BFLOAT16_BITS), ("float16", FLOAT16_BITS))
        for grid, bits in binary:
            if self._on[bits] >= _SHARE * self._n:
                for step in _LOGIT_STEPS:
                    if _explains(np.abs(sample - step * np.rint(sample / step)) <= 1e-6):
                        return "logits", step, -int(math.log2(step))
                kept = 24 - bits
                return grid, 2.0 ** (math.floor(math.log2(size)) + 1 - kept), kept
        if self._n_decimal >= ENOUGH and self._on_decimal >= _SHARE * self._n_decimal:
            for decimals in range(_DECIMALS + 1):
                tells, on = _on_decimals(sample, decimals)
                if tells.any() and _explains(on[tells]):
                    return "decimals", 10.0**-decimals, decimals
        return None


def _severity(step: float, gap: float | None) -> Severity:
    if gap is None:
        return "note"
    return "warn" if step >= gap else "note" if step >= _VISIBLE * gap else "info"


def _explains(on: NDArray[np.bool_]) -> bool:
    return float(np.mean(on)) >= _SHARE


def _on_decimals(values: Floats, decimals: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`[k]` which values are stored finely enough to tell, and which of those have so many decimals at most."""
    scaled = np.abs(values) * 10.0**decimals
    # Where a value is float32, its decimals were rounded to that.
    single = values.astype(np.float32) == values
    spacing = scaled * np.where(single, 2.0**-23, 2.0**-50)
    tells = spacing <= 0.25
    return tells, tells & (np.abs(scaled - np.rint(scaled)) <= spacing)
