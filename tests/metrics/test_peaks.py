"""Streamed peaks against the same numbers held in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.metrics.ranges import PeakSums, context_of

NAMES = ("a", "b", "c")
ALL = np.ones(3, bool)


def sequences(seed: int, n: int = 6) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [np.exp(draw.normal(2, 2, (3, draw.integers(1, 40)))) for _ in range(n)]


def sums_of(peaks: list[np.ndarray]) -> PeakSums:
    sums = PeakSums(NAMES)
    for part in peaks:
        sums.update(part, ALL, ALL)
    return sums


@given(st.integers(0, 200))
def test_streamed_is_in_memory(seed: int) -> None:
    peaks = sequences(seed)
    sums = sums_of(peaks)
    rest = np.concatenate([part[:, 1:] for part in peaks], axis=1)
    every = np.concatenate(peaks, axis=1)
    np.testing.assert_array_equal(sums.first, np.max([part[:, 0] for part in peaks], axis=0))
    np.testing.assert_array_equal(sums.rest, rest.max(1) if rest.size else np.zeros(3))
    np.testing.assert_array_equal(sums.largest, every.max(1))
    for row, (sequence, position) in enumerate(sums.at):
        assert peaks[sequence][row, position] == every[row].max()
    np.testing.assert_array_equal(sums.n_overflow, (every >= 65520).sum(1))
    assert sums.overflow_by_sequence == [int((part >= 65520).any(0).sum()) for part in peaks]
    assert sums.longest == max(part.shape[1] for part in peaks)
    if rest.size:
        for level in (0.5, 0.9):
            exact = np.quantile(rest, level, axis=1, method="inverted_cdf")
            assert (sums.quantile(level) >= exact * (1 - 1e-12)).all()
            assert (sums.quantile(level) <= exact * 2 ** (1 / 8) * (1 + 1e-12)).all()


def test_the_order_of_sequences_does_not_matter() -> None:
    peaks = sequences(3)
    forward, backward = sums_of(peaks), sums_of(peaks[::-1])
    for name in ("first", "rest", "by_context", "histogram", "n_overflow"):
        np.testing.assert_array_equal(getattr(forward, name), getattr(backward, name))


def test_context_bins_hold_their_positions() -> None:
    peaks = np.arange(1.0, 21.0)[None].repeat(3, 0)
    sums = sums_of([peaks])
    for index in range(6):
        first, last = context_of(index)
        assert sums.by_context[0, index] == peaks[0, min(last, 19)] == min(last, 19) + 1
        assert first <= last
    assert sums.by_context[0, 6] == 0
    assert context_of(0) == (0, 0)
    assert context_of(4) == (8, 15)


def test_what_is_not_finite_is_counted_and_leaves_the_rest_alone() -> None:
    sums = sums_of([np.array([[1.0, np.inf], [2.0, 3.0], [np.nan, 1.0]])])
    assert sums.n_nonfinite.tolist() == [1, 0, 1]
    assert sums.n_overflow.tolist() == [1, 0, 1]
    assert sums.largest.tolist() == [1.0, 3.0, 1.0]
    assert sums.overflow_by_sequence == [2]


def test_tensors_that_do_not_count_make_no_token_one_with_an_overflow() -> None:
    sums = PeakSums(NAMES)
    sums.update(np.array([[1e5, 1.0], [1.0, 1.0], [1.0, 1e6]]), np.array([False, True, True]), ALL)
    assert sums.n_overflow.tolist() == [1, 0, 1]
    assert sums.overflow_by_sequence == [1]


def test_a_file_and_a_later_tensor_change_nothing() -> None:
    sums = sums_of(sequences(5))
    again = PeakSums.of_arrays(NAMES, sums.arrays())
    wider = sums.widened((*NAMES, "d"))
    for name, array in sums.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
        np.testing.assert_array_equal(wider.arrays()[name][: len(array)], array)
    assert wider.largest[3] == 0
    assert again.lengths == sums.lengths
    assert sums.widened(NAMES) is sums


def test_a_sequence_of_one_token_has_no_rest() -> None:
    sums = sums_of([np.array([[5.0], [6.0], [7.0]])])
    assert sums.rest.tolist() == [0, 0, 0]
    assert sums.quantile(0.5).tolist() == [0, 0, 0]
    assert sums.largest.tolist() == pytest.approx([5.0, 6.0, 7.0])


def test_a_tensor_without_tokens_has_no_position_and_counts_once_a_sequence() -> None:
    sums = PeakSums(NAMES)
    placed = np.array([True, False, True])
    sums.update(np.array([[1.0, 2.0, 3.0], [7e4, 7e4, 7e4], [3.0, 2.0, 1.0]]), ALL, placed)
    sums.update(np.array([[1.0, 2.0], [np.inf, np.inf], [3.0, 2.0]]), ALL, placed)
    assert sums.first.tolist() == [1.0, 0.0, 3.0]
    assert sums.rest.tolist() == [3.0, 7e4, 2.0]
    assert sums.by_context[1].max() == 0
    assert sums.histogram[1].sum() == 0
    assert sums.n_overflow.tolist() == [0, 2, 0]
    assert sums.n_nonfinite.tolist() == [0, 1, 0]
    assert sums.overflow_by_sequence == [1, 1]
    assert sums.at[1].tolist() == [0, -1]
