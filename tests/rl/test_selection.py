"""The choice of a sanity set, against enumeration and closed forms."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mismatch_probe.rl.sanity.records import keeps, leave_one_out, outcome_of

KEEP = (0.2, 0.8)
bounds = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: (min(pair), max(pair)))


@given(st.integers(2, 9), st.data(), bounds)
def test_the_estimate_is_the_mean_over_every_split(n: int, data: st.DataObject, keep: tuple[float, float]) -> None:
    right = data.draw(st.integers(0, n))
    samples, m = np.arange(n) < right, n - 1
    hits = counts = 0.0
    splits = list(combinations(range(n), m))
    for choosing in splits:
        mask = np.isin(np.arange(n), choosing)
        if keep[0] <= samples[mask].sum() / m <= keep[1]:
            hits += samples[~mask].sum()
            counts += n - m
    found = leave_one_out(np.array([right]), n, keep)
    assert np.array(found)[:, 0] == pytest.approx([hits / len(splits), counts / len(splits)], abs=1e-12)


@given(st.integers(2, 40), st.integers(0, 100).map(lambda k: k / 100), bounds)
def test_the_estimate_has_no_bias(n: int, p: float, keep: tuple[float, float]) -> None:
    # Over the binomial law of a problem's right samples: what is counted is expected to be P(chosen)·p per sample.
    hits, counts = leave_one_out(np.arange(n + 1), n, keep)
    law = stats.binom.pmf(np.arange(n + 1), n, p)
    m = n - 1
    chosen = float((stats.binom.pmf(np.arange(m + 1), m, p) * keeps(np.arange(m + 1) / m, keep)).sum())
    assert law @ counts == pytest.approx(chosen * (n - m), abs=1e-9)
    assert law @ hits == pytest.approx(chosen * (n - m) * p, abs=1e-9)


def test_sampled_accuracy_is_biased_where_the_estimate_is_not() -> None:
    # Every problem has accuracy 0.5, and only those that look better are kept.
    rng = np.random.default_rng(0)
    right = rng.binomial(10, 0.5, 4000)
    found = outcome_of(right, 10, (0.6, 1.0), np.ones(40_000, np.int64), np.zeros(40_000, bool))
    assert found.accuracy_of_kept_as_sampled > 0.64
    estimate = found.accuracy_of_kept_estimate
    assert estimate.value == pytest.approx(0.5, abs=0.015)
    assert estimate.ci_low < 0.5 < estimate.ci_high


@pytest.mark.parametrize(("n", "kept"), [(40, range(8, 33)), (10, range(2, 9)), (5, range(1, 5))])
def test_both_bounds_are_included(n: int, kept: range) -> None:
    assert np.flatnonzero(keeps(np.arange(n + 1) / n, KEEP)).tolist() == list(kept)


@given(st.lists(st.integers(0, 10), min_size=1, max_size=30), bounds, st.randoms(use_true_random=False))
def test_numbers_of_a_set(right: list[int], keep: tuple[float, float], random: object) -> None:
    lengths, truncated = np.arange(1, 10 * len(right) + 1), np.arange(10 * len(right)) % 4 == 0
    found = outcome_of(np.array(right), 10, keep, lengths, truncated)
    assert found.n_below + found.n_kept + found.n_above == found.n_problems == len(right)
    assert found.problems_by_right == tuple(right.count(k) for k in range(11))
    assert found.accuracy == pytest.approx(sum(right) / len(right) / 10)
    inside = [k / 10 for k in right if keep[0] <= k / 10 <= keep[1]]
    expected = sum(inside) / len(inside) if inside else None
    assert found.accuracy_of_kept_as_sampled == (expected if expected is None else pytest.approx(expected))
    n = len(lengths)
    assert found.response_tokens.mean == pytest.approx((n + 1) / 2)
    assert (found.response_tokens.max, found.truncated_fraction) == (n, pytest.approx(truncated.mean()))
    mixed = list(right)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    again = outcome_of(np.array(mixed), 10, keep, lengths, truncated).accuracy_of_kept_estimate
    assert again.value == pytest.approx(found.accuracy_of_kept_estimate.value)


def test_nothing_kept_has_no_accuracy() -> None:
    found = outcome_of(np.array([0, 10, 10]), 10, KEEP, np.ones(30, np.int64), np.zeros(30, bool))
    assert found.n_kept == 0
    assert found.accuracy_of_kept_as_sampled is None
    assert found.accuracy_of_kept_estimate.value is None
    assert found.accuracy_of_kept_estimate.ci_low is None


def test_the_estimate_is_that_of_the_kept_set_where_difficulty_is_skewed() -> None:
    """A choice by half of the samples would let in more hard problems and say .02 less."""
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(40):
        law = rng.beta(0.3, 2.5, 1000)
        right = rng.binomial(40, law)
        found = outcome_of(right, 40, KEEP, np.ones(40_000, np.int64), np.zeros(40_000, bool))
        errors.append(found.accuracy_of_kept_estimate.value - law[keeps(right / 40, KEEP)].mean())
    assert abs(np.mean(errors)) < 0.006
