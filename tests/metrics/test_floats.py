"""Floating-point formats against numpy's own float16, and loss scales against a search and torch's scaler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mismatch_probe.metrics.floats import (
    FORMATS,
    FP16,
    ExponentHistogram,
    scale_range,
    simulate_scaler,
)

values = arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def histogram(gradient: np.ndarray) -> ExponentHistogram:
    """By numpy's frexp, one element at a time in effect."""
    exponents = np.zeros(len(gradient), np.int64)
    magnitude = np.abs(gradient.astype(np.float64))
    finite = np.isfinite(magnitude)
    normal = finite & (magnitude >= 2.0**-126)
    exponents[normal] = np.frexp(magnitude[normal])[1] + 126
    exponents[~finite] = 255
    magnitude = np.where(finite, magnitude, 0.0)
    counts = np.bincount(exponents, minlength=256)
    return ExponentHistogram(counts, np.bincount(exponents, weights=magnitude, minlength=256), float(magnitude.max()))


def half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float16).astype(np.float64)


@given(arrays(np.float64, 20, elements=st.floats(-1e6, 1e6)))
def test_rounding_is_numpys(x: np.ndarray) -> None:
    np.testing.assert_array_equal(FP16.rounded(x), half(x))


def test_bounds_are_where_numpy_rounds_to_infinity_and_to_zero() -> None:
    assert FP16.largest == 65504 == np.finfo(np.float16).max
    assert FP16.overflows_from == 65520
    assert np.isinf(half(np.array([65520.0])))[0]
    assert half(np.array([np.nextafter(65520.0, 0)]))[0] == 65504
    assert FP16.flushes_up_to == 2.0**-25
    assert half(np.array([2.0**-25]))[0] == 0
    assert half(np.array([np.nextafter(2.0**-25, 1)]))[0] == 2.0**-24
    assert FORMATS["float32"].largest == np.finfo(np.float32).max
    assert FORMATS["bfloat16"].largest == pytest.approx(3.3895e38, rel=1e-4)


@given(st.floats(6.2e-5, 6e4))
def test_ulp_is_numpys_spacing(x: float) -> None:
    below = np.float16(x) if float(np.float16(x)) <= x else np.nextafter(np.float16(x), np.float16(0))
    assert FP16.ulp(np.array([x]))[0] == float(np.spacing(below))


@given(values, st.integers(-20, 40))
def test_flushed_and_overflowed_are_what_numpy_makes_of_the_scaled_gradient(x: np.ndarray, exponent: int) -> None:
    h = histogram(x)
    scaled = np.ldexp(x.astype(np.float64), exponent)
    kept = half(scaled)
    assert h.overflows(exponent) == bool(np.isinf(kept).any())
    lost = (kept == 0) & (scaled != 0) & (np.abs(scaled) != 2.0**-25)
    total = np.abs(x.astype(np.float64)).sum()
    expected = np.abs(x.astype(np.float64))[lost].sum() / total if total else 0.0
    assert h.flushed_share(exponent) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(values, st.sampled_from([1e-3, 0.1]))
def test_the_range_of_scales_is_what_a_search_finds(x: np.ndarray, allowed: float) -> None:
    h = histogram(x)
    found = scale_range({"x": h}, flushed=allowed)
    if not np.abs(x).max() > 0:
        assert found is None
        return
    assert found is not None
    assert not h.overflows(found.high)
    assert h.overflows(found.high + 1)
    assert h.flushed_share(found.low) <= allowed
    if h.mass[0] == 0:  # what FP32 has as subnormal is one bin, and leaves a range wider than a search by values
        assert h.flushed_share(found.low - 1) > allowed


def test_each_end_is_decided_by_the_tensor_that_needs_it() -> None:
    large, small = histogram(np.full(3, 2.0**10, np.float32)), histogram(np.full(3, 2.0**-40, np.float32))
    found = scale_range({"large": large, "small": small})
    assert found is not None
    assert (found.high, found.high_by, found.low, found.low_by) == (5, "large", 15, "small")
    assert found.empty
    assert scale_range({}) is None


def test_what_is_not_finite_overflows_at_every_scale() -> None:
    h = histogram(np.array([1.0, np.inf], np.float32))
    assert h.n_nonfinite == 1
    assert h.overflows(-60)


def test_a_gradient_that_is_not_finite_leaves_no_scale() -> None:
    broken, fine = histogram(np.array([1.0, np.inf], np.float32)), histogram(np.ones(2, np.float32))
    found = scale_range({"fine": fine, "broken": broken})
    assert found is not None
    assert found.empty
    assert found.high_by == "broken"
    alone = scale_range({"broken": histogram(np.full(2, np.nan, np.float32))})
    assert alone is not None
    assert alone.empty


def test_the_scaler_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    largest = [3.0, 0.5, 40.0, 1e-3]
    interval, steps = 7, 3 * 7
    trace = simulate_scaler(largest, initial=16, growth_interval=interval)
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    taken, skipped = [], 0
    for step in range(steps):
        found = float(np.isinf(half(np.array([largest[step % 4] * float(scale)])))[0])
        taken += [] if found else [math.log2(float(scale))]
        skipped += int(found)
        torch._amp_update_scale_(scale, tracker, torch.tensor([found]), 2.0, 0.5, interval)
    assert trace.skipped == skipped > 0
    assert trace.first == taken[0]
    assert trace.settled == (min(taken[-interval:]), max(taken[-interval:]))
    assert trace.steps == steps


def test_a_scaler_without_overflow_only_grows() -> None:
    trace = simulate_scaler([1e-12], initial=16, growth_interval=5)
    assert (trace.skipped, trace.skipped_at_start, trace.first) == (0, 0, 16)
    assert trace.settled == (18, 18)


def test_the_ulp_of_zero_is_the_smallest_number() -> None:
    assert FP16.ulp(np.array([0.0]))[0] == 2.0**-24
