"""Exact divergences: closed forms, other libraries' sums, edges, and means over sampled positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special

from mismatch_probe.metrics.exact import ExactRows, divergences, estimator_costs, exact_metrics
from mismatch_probe.metrics.intervals import Estimate, evaluate
from mismatch_probe.types import DIVERGENCES, DRIFT_BUCKETS, MetricValue

LOGITS = arrays(np.float64, (3, 6), elements=st.floats(-30, 30))


def found(mu: Any, pi: Any) -> dict[str, float]:
    with np.errstate(divide="ignore"):
        rows = divergences(np.log(np.atleast_2d(mu)), np.log(np.atleast_2d(pi)))
    return {key: float(values[0]) for key, values in rows.items()}


def test_two_point_laws() -> None:
    p, q = 0.3, 0.4
    got = found([p, 1 - p], [q, 1 - q])
    mu, pi = np.array([p, 1 - p]), np.array([q, 1 - q])
    d = np.log(pi / mu)
    m = (mu + pi) / 2
    want = {
        "kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        "kl_reverse": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
        "js": 0.5 * float(mu @ np.log(mu / m) + pi @ np.log(pi / m)),
        "tv": 0.1,
        "flip": 0.0,
        "entropy_rollout": float(special.entr(mu).sum()),
        "entropy_trainer": float(special.entr(pi).sum()),
        "chi2": float((pi**2 / mu).sum() - 1),
        "k1_square": float(mu @ d**2),
        "k2_square": float(mu @ (d**2 / 2) ** 2),
        "k3_square": float(mu @ (np.expm1(d) - d) ** 2),
    }
    assert got == pytest.approx(want, rel=1e-12)
    assert set(want) == set(DIVERGENCES)


def test_the_likeliest_token_flips() -> None:
    assert found([0.6, 0.4], [0.4, 0.6])["flip"] == 1.0


@given(LOGITS, LOGITS)
def test_sums_are_those_of_scipy(first: np.ndarray, second: np.ndarray) -> None:
    got = divergences(first, second)
    mu, pi = special.softmax(first, axis=1), special.softmax(second, axis=1)
    np.testing.assert_allclose(got["kl"], special.rel_entr(mu, pi).sum(1), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(got["kl_reverse"], special.rel_entr(pi, mu).sum(1), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(got["tv"], 0.5 * np.abs(mu - pi).sum(1), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(got["entropy_rollout"], special.entr(mu).sum(1), rtol=1e-9, atol=1e-13)


@given(LOGITS, LOGITS)
def test_what_must_hold_of_any_two_laws(first: np.ndarray, second: np.ndarray) -> None:
    here, there = divergences(first, second), divergences(second, first)
    for key in ("kl", "kl_reverse", "js", "tv", "chi2", "k1_square", "k2_square", "k3_square"):
        assert (here[key] >= -1e-15).all()
    np.testing.assert_allclose(here["kl"], there["kl_reverse"], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(here["js"], there["js"], rtol=1e-9, atol=1e-14)
    assert (here["js"] <= math.log(2) + 1e-12).all()
    assert (here["tv"] <= 1 + 1e-12).all()
    assert (here["kl"] >= 2 * here["tv"] ** 2 - 1e-12).all()  # Pinsker
    assert (here["chi2"] >= here["kl_reverse"] - 1e-9 * here["kl_reverse"]).all()


@given(LOGITS, st.floats(-50, 50))
def test_a_law_and_itself_shifted(logits: np.ndarray, shift: float) -> None:
    got = divergences(logits, logits + shift)
    for key in set(DIVERGENCES) - {"entropy_rollout", "entropy_trainer", "flip"}:
        np.testing.assert_allclose(got[key], 0.0, atol=1e-24 if "square" in key else 1e-13)


def test_float32_sized_gaps_keep_their_digits() -> None:
    """Against 50 digits: the textbook float64 sum is off in its third digit at x of 1e-6, ours is not."""
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 200)
    moved = logits + 1e-6 * rng.normal(0, 1, 200)

    def law(values: np.ndarray) -> list[Decimal]:
        weights = [Decimal(float(v)).exp() for v in values]
        return [w / sum(weights) for w in weights]

    mu, pi = law(logits), law(moved)
    exact = float(sum(m * (m / p).ln() for m, p in zip(mu, pi, strict=True)))
    assert 1e-14 < exact < 1e-11
    got = divergences(logits[None], moved[None])
    assert got["kl"][0] == pytest.approx(exact, rel=1e-6)
    assert got["js"][0] == pytest.approx(exact / 4, rel=1e-3)
    assert got["k1_square"][0] == pytest.approx(2 * exact, rel=1e-3)


def test_temperature_is_that_of_divided_logits() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 3, (2, 4, 9))
    here, there = divergences(first, second, 0.6), divergences(first / 0.6, second / 0.6)
    for key in DIVERGENCES:
        np.testing.assert_allclose(here[key], there[key], rtol=1e-12)


def test_tokens_that_one_side_excludes() -> None:
    mu, pi = np.array([0.5, 0.3, 0.2]), np.array([0.625, 0.375, 0.0])
    there = found(pi, mu)
    assert there["kl"] == pytest.approx(-math.log(0.8))  # π is μ without its last token: log of the kept mass
    assert there["kl_reverse"] == math.inf
    assert there["chi2"] == math.inf
    assert there["tv"] == pytest.approx(0.2)
    assert there["k1_square"] == pytest.approx(math.log(0.8) ** 2)
    here = found(mu, pi)
    assert here["kl"] == here["k1_square"] == here["k3_square"] == math.inf
    assert here["kl_reverse"] == pytest.approx(-math.log(0.8))
    assert here["chi2"] == pytest.approx(1 / 0.8 - 1)
    m = (mu + pi) / 2
    js = 0.5 * float(special.rel_entr(mu, m).sum() + special.rel_entr(pi, m).sum())
    assert here["js"] == there["js"] == pytest.approx(js)


def test_tokens_that_both_exclude_have_no_part() -> None:
    with_none = found([0.5, 0.5, 0.0], [0.25, 0.75, 0.0])
    assert with_none == pytest.approx(found([0.5, 0.5], [0.25, 0.75]))


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_what_underflows_is_not_excluded(temperature: float) -> None:
    """At a low temperature most probabilities are below what float64 holds; against sums of Python's own."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    rng = np.random.default_rng(7)
    first, second = rng.normal(0, 3, (2, 40))
    got = divergences(first[None], second[None], temperature)

    def law(values: np.ndarray) -> list[Decimal]:
        weights = [(Decimal(float(v)) / Decimal(temperature)).exp() for v in values]
        return [w / sum(weights) for w in weights]

    mu, pi = law(first), law(second)
    pairs = list(zip(mu, pi, strict=True))
    d = [(p / m).ln() for m, p in pairs]
    assert got["kl"][0] == pytest.approx(float(-sum(m * x for m, x in zip(mu, d, strict=True))), rel=1e-9)
    assert got["kl_reverse"][0] == pytest.approx(float(sum(p * x for p, x in zip(pi, d, strict=True))), rel=1e-9)
    assert got["tv"][0] == pytest.approx(float(sum(abs(p - m) for m, p in pairs)) / 2, rel=1e-9)
    assert got["k1_square"][0] == pytest.approx(float(sum(m * x * x for m, x in zip(mu, d, strict=True))), rel=1e-9)
    middle = [(m + p) / 2 for m, p in pairs]
    js = sum(m * (m / c).ln() + p * (p / c).ln() for (m, p), c in zip(pairs, middle, strict=True)) / 2
    assert got["js"][0] == pytest.approx(float(js), rel=1e-9)
    if temperature == 1.0:
        assert got["chi2"][0] == pytest.approx(float(sum(p * p / m for m, p in pairs)) - 1, rel=1e-9)
        k3 = [(p / m - 1 - x) for (m, p), x in zip(pairs, d, strict=True)]
        want = float(sum(m * k * k for m, k in zip(mu, k3, strict=True)))
        assert got["k3_square"][0] == pytest.approx(want, rel=1e-9)


def test_rows_with_nan_are_nan_and_alone() -> None:
    logits = np.zeros((2, 3))
    logits[0, 1] = np.nan
    got = divergences(logits, np.zeros((2, 3)))
    assert all(np.isnan(values[0]) and np.isfinite(values[1]) for values in got.values())


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        divergences(np.zeros((1, 3)), np.zeros((1, 4)))


def exact_rows(values: np.ndarray, prompt: np.ndarray, **options: Any) -> ExactRows:
    """Every position compared, unless options say otherwise; all columns hold `values`."""
    ones = np.ones(len(values))
    counts = np.bincount(prompt).astype(np.float64)
    defaults = {"weight": ones, "stands_for": ones, "tokens": counts, "sequences": np.ones(len(counts))}
    return ExactRows(values=dict.fromkeys(DIVERGENCES, values), prompt=prompt, **{**defaults, **options})


def evaluated(rows: ExactRows) -> dict[str, MetricValue]:
    results = exact_metrics(rows)
    estimates = {key: result for key, result in results.items() if isinstance(result, Estimate)}
    fixed = {key: result for key, result in results.items() if isinstance(result, MetricValue)}
    return fixed | evaluate(estimates, seed=0, replicates=300)


def test_with_every_position_the_mean_is_the_mean() -> None:
    rng = np.random.default_rng(4)
    values, prompt = rng.lognormal(-7, 1, 400), np.repeat(np.arange(40), 10)
    got = evaluated(exact_rows(values, prompt))
    assert got["kl_exact"].value == pytest.approx(values.mean())
    assert got["top1_flip_rate"].value == pytest.approx(values.mean())
    assert got["kl_seq_exact"].value == pytest.approx(10 * values.mean())
    for key in ("kl_exact", "kl_seq_exact", "entropy_trainer"):
        low, value, high = got[key].ci_low, got[key].value, got[key].ci_high
        assert low is not None
        assert value is not None
        assert high is not None
        assert low < value < high


def test_sampled_positions_stand_for_the_others() -> None:
    """Weights that follow the divergence: half of the positions give the mean of all of them to a few percent."""
    rng = np.random.default_rng(5)
    weight = rng.uniform(0.1, 1, 4000)
    prompt, values = np.repeat(np.arange(80), 50), weight * rng.lognormal(-7, 0.2, 4000)
    chance = np.minimum(1.0, weight * 0.9)
    kept = rng.random(4000) < chance
    scale = weight.sum() / (weight[kept] / chance[kept]).sum()
    rows = exact_rows(
        values[kept],
        prompt[kept],
        weight=weight[kept],
        stands_for=scale / chance[kept],
        tokens=np.full(80, 50.0),
        sequences=np.full(80, 2.0),
    )
    got = evaluated(rows)
    assert got["kl_exact"].value == pytest.approx(values.mean(), rel=0.02)
    assert got["kl_seq_exact"].value == pytest.approx(25 * values.mean(), rel=0.02)


def test_no_rows_and_no_finite_rows_say_so() -> None:
    assert {value.why for value in exact_metrics(None).values() if isinstance(value, MetricValue)} == {
        "no rows of logits were compared; --exact-kl keeps some"
    }
    nan = np.full(3, np.nan)
    sketches = np.full((3, DRIFT_BUCKETS), np.nan, np.float32)
    broken = exact_metrics(exact_rows(nan, np.arange(3), drift_square=nan, drift_sketch=sketches))
    assert {value.why for value in broken.values() if isinstance(value, MetricValue)} == {
        "finite at none of the 3 compared positions"
    }


def test_rows_that_are_not_finite_are_counted() -> None:
    values = np.full(40, 1e-3)
    values[7] = np.inf
    got = evaluated(exact_rows(values, np.arange(40)))
    assert "computed over the 39 of 40 positions that are finite" in got["kl_exact"].why


def test_identical_rows_give_exact_zeros() -> None:
    got = evaluated(exact_rows(np.zeros(40), np.arange(40)))
    assert (got["kl_exact"].value, got["kl_exact"].ci_low, got["kl_exact"].ci_high) == (0.0, 0.0, 0.0)


def test_what_estimators_cost_is_what_sampling_shows() -> None:
    """Sampling tokens from the laws themselves gives each estimator's mean and standard deviation."""
    rng = np.random.default_rng(6)
    first = rng.normal(0, 2, (200, 12))
    second = first + 0.1 * rng.normal(0, 1, first.shape)
    rows = divergences(first, second)
    ones = np.ones(200)
    costs = {cost.key: cost for cost in estimator_costs(ExactRows(rows, ones, ones, np.arange(200), ones, ones))}
    mu, log_ratio = special.softmax(first, 1), special.log_softmax(second, 1) - special.log_softmax(first, 1)
    tokens = np.array([rng.choice(12, 4000, p=law) for law in mu])
    d = np.take_along_axis(log_ratio, tokens, 1)
    sampled = {"kl_k1": -d, "kl_k2": 0.5 * d**2, "kl_k3": np.expm1(d) - d}
    for key, draws in sampled.items():
        error = draws.std() / np.sqrt(draws.size)
        assert abs(draws.mean() - costs[key].mean) < 4 * error
        assert draws.std() == pytest.approx(costs[key].standard_deviation, rel=0.05)
    assert costs["kl_k1"].bias == costs["kl_k3"].bias == 0.0
    assert costs["kl_exact"].standard_deviation == pytest.approx(rows["kl"].std())
    assert costs["kl_exact"].mean == pytest.approx(rows["kl"].mean())


def test_tokens_needed_by_the_textbook() -> None:
    """A two-point d of known variance: n = (1.96 / 0.1)² Var / KL²."""
    rows = divergences(np.log([[0.5, 0.5]]), np.log([[0.4, 0.6]]))
    one = np.ones(1)
    costs = {c.key: c for c in estimator_costs(ExactRows(rows, one, one, np.array([0]), one, one))}
    variance = float(rows["k1_square"][0] - rows["kl"][0] ** 2)
    assert costs["kl_k1"].tokens_needed == math.ceil(variance * (1.959963984540054 / (0.1 * rows["kl"][0])) ** 2)
    assert costs["kl_exact"].tokens_needed == 1


def test_nothing_is_needed_for_no_divergence() -> None:
    zero = exact_rows(np.zeros(4), np.arange(4))
    assert {cost.tokens_needed for cost in estimator_costs(zero)} == {None}
