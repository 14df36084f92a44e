"""The course of a metric over steps, against closed forms and scipy on constructed series."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.metrics.course import largest_jump, trend

Floats = NDArray[np.float64]
SERIES = arrays(np.float64, st.integers(8, 60), elements=st.floats(-1e3, 1e3).map(lambda x: round(x, 6)))


def counted(n: int) -> Floats:
    return np.arange(n, dtype=np.float64)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_steps_have_no_jump(n: int) -> None:
    assert largest_jump(counted(n) ** 2) is None


@pytest.mark.parametrize("n", [0, 1, 7])
def test_too_few_steps_have_no_trend(n: int) -> None:
    assert trend(counted(n), counted(n)) is None


@pytest.mark.parametrize("values", [np.ones(600), np.ones(9)])
def test_nothing_changes(values: Floats) -> None:
    assert largest_jump(values) is None
    assert trend(counted(len(values)), values) is None


def test_a_steady_rise_has_no_jump_and_its_slope() -> None:
    steps = 3.0 * counted(20)
    found = trend(steps, 2 + steps / 4)
    assert largest_jump(2 + steps / 4) is None
    assert found is not None
    assert found.per_100.value == pytest.approx(25)
    assert (found.per_100.ci_low, found.per_100.ci_high, found.tau) == (pytest.approx(25), pytest.approx(25), 1)


def test_a_jump_is_counted_in_deviations_of_changes() -> None:
    # Changes alternate between 1 and -1, and one is 50: their median is 1, distances are 0, 2 and 49.
    changes = np.array([1, -1] * 5 + [50] + [-1, 1] * 5, dtype=np.float64)
    values = np.concatenate([[0], np.cumsum(changes)])
    found = largest_jump(values)
    distances = np.abs(changes - np.median(changes))
    assert found is not None
    assert found.before == 10
    assert found.units == pytest.approx(distances.max() / stats.median_abs_deviation(changes, scale=1 / 1.4826))


def test_of_a_spike_the_rise_is_told() -> None:
    values = np.random.default_rng(0).normal(0, 0.01, 40)
    values[20] += 9
    found = largest_jump(values)
    assert found is not None
    assert found.before == 19


def test_where_most_changes_are_equal_there_is_no_unit() -> None:
    found = largest_jump(np.array([0.0] * 10 + [5.0] * 10))
    assert found is not None
    assert (found.before, found.units) == (9, None)


@given(SERIES, st.floats(0.1, 100), st.floats(-100, 100))
def test_a_jump_does_not_depend_on_unit_and_zero(values: Floats, scale: float, shift: float) -> None:
    found, other = largest_jump(values), largest_jump(np.float64(4.0) * values)
    assert (found is None) == (other is None)
    if found is not None and other is not None:
        assert found.before == other.before
        assert found.units == pytest.approx(other.units)


@given(SERIES)
def test_a_trend_is_that_of_all_pairs(values: Floats) -> None:
    steps = counted(len(values)) * 2
    found = trend(steps, values)
    if found is None:
        assert np.ptp(values) == 0
        return
    first, second = np.triu_indices(len(values), 1)
    slopes = (values[second] - values[first]) / (steps[second] - steps[first])
    assert found.per_100.value == pytest.approx(100 * np.median(slopes), rel=1e-9, abs=1e-9)
    ties = len(first) - np.count_nonzero(slopes)
    both = np.sqrt(len(first) * (len(first) - ties))
    assert found.tau == pytest.approx(np.sign(slopes).sum() / both)
    assert found.per_100.ci_low is not None
    assert found.per_100.ci_high is not None
    assert found.per_100.ci_low <= found.per_100.value <= found.per_100.ci_high  # type: ignore[operator]


def test_many_steps_are_taken_in_blocks() -> None:
    steps = counted(5000)
    noisy = steps * 1e-3 + np.random.default_rng(1).normal(0, 1, 5000)
    found = trend(steps, noisy)
    assert found is not None
    assert found.per_100.value == pytest.approx(0.1, rel=0.05)
    assert found.tau > 0.8


def test_the_interval_of_noise_covers_no_slope() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        found = trend(counted(30), rng.standard_t(3, 30))
        assert found is not None
        hits += found.per_100.ci_low <= 0 <= found.per_100.ci_high  # type: ignore[operator]
    assert stats.binomtest(hits, 200, 0.95).pvalue > 1e-3
