"""What a floating-point format does to numbers: rounding to infinity, to zero, and the range of loss scales between.

Gradients come as histograms over binary exponents, so that what a loss scale 2^k would overflow or flush is a sum over
bins: a value in [2^e, 2^(e+1)) is scaled into [2^(e+k), 2^(e+k+1)). Rounding is to nearest, ties to even (IEEE 754).

Shape legend: `E` = 256 biased FP32 exponents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.dtypes import DTYPE_INFOS

Floats = NDArray[np.float64]
EXPONENTS = 256
# Below every exponent of FP32: no loss scale is as small.
NO_SCALE = -999
# The exponent that torch's GradScaler starts at.
FIRST_SCALE = 16
_BIAS = 127


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format with subnormal numbers.

    Attributes:
        name: As a dtype is called.
        digits: Significant bits, the hidden one included.
        lowest, highest: Exponents of the smallest and of the largest normal numbers.
    """

    name: str
    digits: int
    lowest: int
    highest: int

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2.0 - 2.0 ** (1 - self.digits), self.highest)

    @property
    def overflows_from(self) -> float:
        """The smallest magnitude that rounds to infinity: half a unit above the largest number."""
        return math.ldexp(2.0 - 2.0**-self.digits, self.highest)

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.lowest)

    @property
    def flushes_up_to(self) -> float:
        """The largest magnitude that rounds to zero: half of the smallest subnormal number."""
        return math.ldexp(1.0, self.lowest - self.digits)

    def ulp(self, values: Floats) -> Floats:
        """The distance between the numbers of this format around each value, in the value's unit."""
        magnitude = np.asarray(np.abs(values), dtype=np.float64)
        exponent = np.where(magnitude > 0, np.frexp(magnitude)[1], self.lowest)  # frexp gives 0 an exponent of 0
        floor = np.maximum(exponent - 1, self.lowest)
        return np.asarray(np.ldexp(1.0, np.asarray(floor - self.digits + 1)))

    def rounded(self, values: Floats) -> Floats:
        """Each value as this format keeps it, in float64."""
        values = np.asarray(values, dtype=np.float64)
        step = self.ulp(values)
        kept = np.round(values / step) * step  # numpy rounds half to even, and the step is a power of two
        return np.where(np.abs(kept) > self.largest, np.copysign(np.inf, values), kept)


FORMATS = {
    name: FloatFormat(name, info.digits, info.lowest, info.highest)
    for name, info in DTYPE_INFOS.items()
    if name != "float64"
}
FP16 = FORMATS["float16"]


@dataclass(frozen=True)
class ExponentHistogram:
    """Magnitudes of a tensor's elements, by binary exponent.

    Attributes:
        counts: `[E]` elements; bin i holds those in [2^(i−127), 2^(i−126)), bin 0 zeros and what FP32 has as subnormal,
            bin 255 what is not finite.
        mass: `[E]` Σ|x| of them.
        largest: max |x| of the finite ones.
    """

    counts: NDArray[np.int64]
    mass: Floats
    largest: float

    @property
    def n_nonfinite(self) -> int:
        return int(self.counts[-1])

    def overflows(self, exponent: int, form: FloatFormat = FP16) -> bool:
        """Whether any element is infinite after multiplication by 2^exponent."""
        return self.n_nonfinite > 0 or math.ldexp(self.largest, exponent) >= form.overflows_from

    def flushed_share(self, exponent: int, form: FloatFormat = FP16) -> float:
        """Σ|x| over the elements that become 0 after multiplication by 2^exponent, over Σ|x|; 0 for no mass.

        A value of exactly half the smallest subnormal, which becomes 0 too, is not counted.
        """
        total = float(self.mass[:-1].sum())
        edge = form.lowest - form.digits - exponent + _BIAS
        return float(self.mass[: max(0, min(edge, EXPONENTS - 1))].sum()) / total if total else 0.0


@dataclass(frozen=True)
class ScaleRange:
    """Loss scales, as exponents of two.

    Attributes:
        low: The smallest that flushes no more than was allowed of any tensor.
        high: The largest that overflows nothing.
        low_by, high_by: The tensors that decide each end.
    """

    low: int
    high: int
    low_by: str
    high_by: str

    @property
    def empty(self) -> bool:
        return self.low > self.high


def scale_range(
    histograms: dict[str, ExponentHistogram], *, flushed: float = 1e-3, form: FloatFormat = FP16
) -> ScaleRange | None:
    """The loss scales that neither overflow nor flush more than a share of any tensor's Σ|g|; None without gradients. A
    tensor that is not finite to begin with leaves none.

    Args:
        histograms: Of unscaled gradients, by tensor.
        flushed: The share that may be lost.
        form: What gradients are kept in.
    """
    live = {name: h for name, h in histograms.items() if h.largest > 0 or h.n_nonfinite}
    if not live:
        return None
    highs = {name: NO_SCALE if h.n_nonfinite else _highest(h.largest, form) for name, h in live.items()}
    lows = {name: _lowest(h, flushed, form) if h.largest > 0 else NO_SCALE + 1 for name, h in live.items()}
    high_by, low_by = min(highs, key=lambda name: highs[name]), max(lows, key=lambda name: lows[name])
    return ScaleRange(lows[low_by], highs[high_by], low_by, high_by)


def _highest(largest: float, form: FloatFormat) -> int:
    exponent = form.highest + 1 - math.frexp(largest)[1]
    return exponent if math.ldexp(largest, exponent) < form.overflows_from else exponent - 1


def _lowest(histogram: ExponentHistogram, flushed: float, form: FloatFormat) -> int:
    """The share that is flushed falls as the scale rises, one bin at each step."""
    cumulated = np.cumsum(histogram.mass[:-1]) / histogram.mass[:-1].sum()
    bins = int(np.searchsorted(cumulated, flushed, side="right"))  # so many whole bins may be lost
    return form.lowest - form.digits + _BIAS - bins


@dataclass(frozen=True)
class ScalerTrace:
    """A dynamic loss scaler at work.

    Attributes:
        skipped_at_start: Steps that were skipped before the first one that was taken.
        first: The exponent of the scale at that step.
        settled: Exponents of the smallest and the largest scale of steps that were taken in the last growth interval.
        skipped: Steps that were skipped in all.
        steps: Steps in all.
    """

    skipped_at_start: int
    first: int
    settled: tuple[int, int]
    skipped: int
    steps: int


def simulate_scaler(
    largest: Sequence[float],
    *,
    initial: int = FIRST_SCALE,
    growth_interval: int = 2000,
    intervals: int = 3,
    form: FloatFormat = FP16,
) -> ScalerTrace:
    """A dynamic scaler as torch's GradScaler has it: half the scale and skip on overflow, double after an interval.

    Args:
        largest: The largest gradient of any tensor in each of some batches, which are met in turn; finite.
        initial: Exponent of the first scale.
        growth_interval: Steps without overflow after which the scale doubles.
        intervals: How many growth intervals to simulate.
        form: What gradients are kept in.
    """
    highest = [_highest(value, form) if value > 0 else np.inf for value in largest]
    scale, good, skipped, at_start, first = initial, 0, 0, 0, None
    taken: list[int] = []
    steps = intervals * growth_interval
    for step in range(steps):
        if scale > highest[step % len(highest)]:
            skipped += 1
            at_start += first is None
            scale, good = scale - 1, 0
            continue
        first = scale if first is None else first
        taken.append(scale)
        good += 1
        if good == growth_interval:
            scale, good = scale + 1, 0
    last = taken[-growth_interval:] or [scale]
    return ScalerTrace(at_start, scale if first is None else first, (min(last), max(last)), skipped, steps)
