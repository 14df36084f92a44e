"""Tests that few runs can support, against other implementations, closed forms and simulation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from mismatch_probe.metrics.arms import (
    MIN_PAIRS,
    detectable_difference,
    detectable_share,
    fisher_can_show,
    fisher_p,
    sign_flip_p,
)
from mismatch_probe.metrics.inference import holm

# Differences of rewards over 64 problems: small multiples of 1/64, so ties and zeros are frequent.
grid = st.integers(-20, 20).map(lambda k: k / 64)


def rejection_rate(sweeps: NDArray[np.float64], level: float = 0.05) -> float:
    """Share of the rows `[R, n]` in which the test rejects."""
    return float(np.mean([sign_flip_p(row) < level for row in sweeps]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_sign_flip_is_the_share_of_patterns_in_exact_arithmetic(counts: list[int]) -> None:
    """In tenths, which float64 cannot hold: what is a tie in integers must be one in floats."""
    sums = [
        abs(sum(s * k for s, k in zip(signs, counts, strict=True))) for signs in product((1, -1), repeat=len(counts))
    ]
    expected = Fraction(sum(total >= abs(sum(counts)) for total in sums), len(sums))
    assert sign_flip_p(np.array(counts) * 0.1) == float(expected)


@pytest.mark.parametrize("n", [8, 10])
@pytest.mark.parametrize("digits", [1, 12])
def test_sign_flip_equals_scipy(n: int, digits: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.4, 1.5):
        d = np.round(rng.normal(shift, 1, n), digits)
        theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**n, vectorized=False)
        assert sign_flip_p(d) == pytest.approx(theirs.pvalue, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(1, 13)), st.lists(st.booleans(), min_size=12, max_size=12))
def test_of_ranks_it_is_wilcoxons_test(ranks: list[int], up: list[bool]) -> None:
    d = np.array(ranks) * np.where(up, 1.0, -1.0)
    assert sign_flip_p(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-12)


@pytest.mark.parametrize(("n", "up"), [(9, 8), (16, 12), (20, 14), (40, 26), (100, 61)])
def test_of_equal_sizes_it_is_the_sign_test(n: int, up: int) -> None:
    """Enumerated up to 16 pairs; beyond, within 4 standard errors of 65,536 random patterns."""
    d = np.where(np.arange(n) < up, 0.25, -0.25)
    exact = stats.binomtest(up, n).pvalue
    error = 4 * math.sqrt(exact * (1 - exact) / 2**16) if n > 16 else 1e-12
    assert abs(sign_flip_p(d) - exact) <= error


def test_random_patterns_never_give_zero() -> None:
    assert sign_flip_p(np.ones(60)) == 2.0**-16


@settings(max_examples=60, deadline=None)
@given(st.lists(grid, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_sign_flip_bounds_and_invariances(differences: list[float], random: object) -> None:
    d = np.array(differences)
    p = sign_flip_p(d)
    assert max(2.0 ** (1 - len(d)), 2.0**-16) <= p <= 1
    assert sign_flip_p(-d) == p
    assert sign_flip_p(8 * d) == p
    shuffled = list(differences)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sign_flip_p(np.array(shuffled)) == p
    if len(d) < 16:
        assert sign_flip_p(np.append(d, 0.0)) == p  # a pair without a difference adds nothing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=16), st.integers(0, 3))
def test_smallest_p_and_what_pairs_without_a_difference_cost(positive: list[float], zeros: int) -> None:
    """The table of the module: 2^(1−n), doubled by every zero."""
    kept = positive[: 16 - zeros]
    d = np.array(kept + [0.0] * zeros)
    assert sign_flip_p(d) == 2.0 ** (1 - len(d)) * 2**zeros


def test_why_eight_pairs() -> None:
    def smallest(pairs: int, tests: int) -> float:
        adjusted = holm([sign_flip_p(np.ones(pairs)), *[1.0] * (tests - 1)])[0]
        assert adjusted is not None
        return adjusted

    assert smallest(5, 1) > 0.05
    assert smallest(6, 1) < 0.05 < smallest(6, 2)
    assert smallest(MIN_PAIRS, 6) < 0.05 < smallest(MIN_PAIRS, 7)
    ties = {n: sign_flip_p(np.r_[np.ones(MIN_PAIRS - n), np.zeros(n)]) for n in (2, 3)}
    assert ties[2] < 0.05 < ties[3]


@pytest.mark.parametrize("law", ["normal", "heavy", "skewed", "binomial"])
def test_size(law: str) -> None:
    """Arms of the same law, so differences are symmetric whatever it is. 8 pairs attain .0469, fewer with ties."""
    rng = np.random.default_rng(7)
    draw = {
        "normal": lambda size: rng.normal(size=size),
        "heavy": lambda size: rng.standard_cauchy(size),
        "skewed": lambda size: rng.exponential(size=size) ** 3,
        "binomial": lambda size: rng.binomial(64, 0.9, size) / 64,
    }[law]
    shared = draw((3000, 8))  # what a seed does to both arms
    rate = rejection_rate(shared + draw((3000, 8)) - (shared + draw((3000, 8))))
    error = math.sqrt(0.05 * 0.95 / 3000)
    assert rate <= 0.05 + 2 * error
    assert rate >= (0.02 if law == "binomial" else 0.047 - 3 * error)


def power_of_t(effect: float, n: int, level: float) -> float:
    """By integration over the law of the standard deviation, without the noncentral t."""
    critical = stats.t.ppf(1 - level / 2, n - 1)

    def integrand(s: float) -> float:
        centre = effect * math.sqrt(n)
        beyond = stats.norm.sf(critical * s - centre) + stats.norm.cdf(-critical * s - centre)
        return float(stats.chi.pdf(s * math.sqrt(n - 1), n - 1) * math.sqrt(n - 1) * beyond)

    return float(integrate.quad(integrand, 0, np.inf, limit=200)[0])


@pytest.mark.parametrize(
    ("n", "n_tests", "attained"), [(3, 1, 0.05), (5, 4, 0.05), (8, 1, 6 / 128), (8, 2, 3 / 128), (12, 5, 20 / 2048)]
)
def test_detectable_difference_inverts_the_power_of_t(n: int, n_tests: int, attained: float) -> None:
    """20/2048 < .05/5 < 21/2048, and so on. Below 8 pairs there is no test, and no adjustment."""
    effect = optimize.brentq(lambda x: power_of_t(x, n, attained) - 0.8, 0.1, 10)
    assert detectable_difference(1.0, n, n_tests) == pytest.approx(effect, rel=1e-4)
    assert detectable_difference(0.3, n, n_tests) == pytest.approx(0.3 * effect, rel=1e-4)


@pytest.mark.parametrize(
    ("n", "n_tests", "low", "high"),
    [
        (8, 1, 0.77, 0.82),
        (8, 2, 0.74, 0.82),
        (8, 6, 0.78, 0.82),
        (10, 1, 0.78, 0.82),
        (10, 12, 0.70, 0.76),
        (12, 3, 0.77, 0.82),
    ],
)
def test_power_at_the_detectable_difference(n: int, n_tests: int, low: float, high: float) -> None:
    """Of the sign-flip test itself, on normal differences; the standard error of 3,000 sweeps is .007."""
    effect = detectable_difference(1.0, n, n_tests)
    assert effect is not None
    sweeps = np.random.default_rng(n_tests).normal(effect, 1, (3000, n))
    assert low <= rejection_rate(sweeps, 0.05 / n_tests) <= high


def test_power_of_the_t_test_where_there_are_too_few_pairs() -> None:
    effect = detectable_difference(2.0, 5)
    assert effect is not None
    sweeps = np.random.default_rng(3).normal(effect, 2.0, (20000, 5))
    assert np.mean(stats.ttest_1samp(sweeps, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(1, 40))
def test_detectable_difference_falls_with_pairs_and_grows_with_tests(n: int, n_tests: int) -> None:
    now = detectable_difference(1.0, n, n_tests)
    more_tests = detectable_difference(1.0, n, n_tests + 1)
    assert now is None or now > 0
    if now is None:
        assert more_tests is None
        assert n >= MIN_PAIRS
        assert 2.0 ** (1 - n) * n_tests >= 0.05
    elif more_tests is not None:
        assert more_tests >= now
    if n != MIN_PAIRS - 1 and now is not None:  # from 7 pairs to 8 the test and its adjustment begin
        more_pairs = detectable_difference(1.0, n + 1, n_tests)
        assert more_pairs is not None
        assert more_pairs < now


def test_no_difference_is_detectable_where_no_pattern_rejects() -> None:
    assert detectable_difference(1.0, 8, 6) is not None
    assert detectable_difference(1.0, 8, 7) is None
    assert detectable_difference(1.0, 1) is None
    assert detectable_difference(1.0, 5000) == pytest.approx(2.80 / math.sqrt(5000), rel=0.01)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (4, 4), (5, 9), (8, 8)])
def test_fisher_equals_scipy(n: int, m: int) -> None:
    theirs = {(i, j): stats.fisher_exact([[i, n - i], [j, m - j]])[1] for i in range(n + 1) for j in range(m + 1)}
    for (i, j), p in theirs.items():
        assert fisher_p((i, j), (n, m)) == pytest.approx(p, rel=1e-9)
        assert fisher_p((j, i), (m, n)) == fisher_p((i, j), (n, m))
    assert fisher_can_show((n, m)) == (min(theirs.values()) < 0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_fisher_bounds(n: int, m: int, data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    p = fisher_p((i, j), (n, m))
    assert 1 / math.comb(n + m, i + j) * (1 - 1e-12) <= p <= 1
    assert fisher_p((n - i, m - j), (n, m)) == p


def test_fisher_size() -> None:
    rng = np.random.default_rng(11)
    for share in (0.1, 0.5):
        counts = rng.binomial(8, share, (4000, 2)).tolist()
        assert np.mean([fisher_p((i, j), (8, 8)) < 0.05 for i, j in counts]) <= 0.05


def test_fisher_needs_four_runs_each() -> None:
    assert not fisher_can_show((3, 3))
    assert fisher_can_show((4, 4))
    assert not fisher_can_show((0, 8))


@pytest.mark.parametrize(("n", "fewest"), [(4, 4), (5, 4), (8, 5)])
def test_detectable_share_where_the_other_arm_never_collapses(n: int, fewest: int) -> None:
    """With 0 of n it takes `fewest` of n for p < .05, which the share found reaches 8 times in 10."""
    assert fisher_p((0, fewest), (n, n)) < 0.05 <= fisher_p((0, fewest - 1), (n, n))
    share = detectable_share(0.0, n, n)
    assert share is not None
    assert stats.binom.sf(fewest - 1, n, share) == pytest.approx(0.8, abs=1e-9)


@pytest.mark.parametrize(("share", "n", "m", "n_tests"), [(0.05, 16, 16, 1), (0.2, 20, 12, 1), (0.1, 16, 16, 3)])
def test_power_at_the_detectable_share(share: float, n: int, m: int, n_tests: int) -> None:
    other = detectable_share(share, n, m, n_tests)
    assert other is not None
    rng = np.random.default_rng(5)
    counts = zip(rng.binomial(n, share, 4000), rng.binomial(m, other, 4000), strict=True)
    shown = [fisher_p((int(i), int(j)), (n, m)) < 0.05 / n_tests for i, j in counts]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.02)
    assert other > share


def test_no_share_is_detectable_beside_a_large_one() -> None:
    assert detectable_share(0.5, 8, 8) is None
    assert detectable_share(0.0, 4, 4, n_tests=2) is None  # the smallest p is .029
    assert detectable_share(1.0, 8, 8) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10).map(lambda k: k / 20), st.integers(4, 14))
def test_detectable_share_grows_with_tests(share: float, n: int) -> None:
    found = [detectable_share(share, n, n, n_tests) for n_tests in (1, 2, 5)]
    known = [value for value in found if value is not None]
    assert found[: len(known)] == known
    assert known == sorted(known)
