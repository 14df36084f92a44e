"""Interval machinery: shares, quantiles, Poisson counts, gradients, chunks, and coverage under heavy tails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special, stats

from mismatch_probe.metrics import intervals, scales
from mismatch_probe.metrics.inference import Inference, degrees_of_freedom, excess_kurtosis
from mismatch_probe.metrics.intervals import (
    Estimate,
    evaluate,
    infer,
    poisson_interval,
    quantile_interval,
    rare_share_interval,
    share_interval,
)
from mismatch_probe.metrics.sample import usable_tokens
from mismatch_probe.metrics.summary import token_metrics
from mismatch_probe.types import PairArrays


def estimate(key: str, pair: PairArrays) -> Estimate:
    result = token_metrics()[key](usable_tokens(pair))
    assert isinstance(result, Estimate)
    return result


STUDIES = Path(__file__).parents[2] / "validation"


def load_coverage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """validation/coverage.py under another name, since `coverage` is a well-known package."""
    monkeypatch.syspath_prepend(str(STUDIES))
    spec = importlib.util.spec_from_file_location("coverage_benchmark", STUDIES / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


HARD_KEYS = ("rms_logprob_diff", "kl_k3", "ess_token", "seq_log_ratio_std", "std_prob_diff")
EASY_KEYS = ("mean_abs_logprob_diff", "kl_k1", "mean_ratio", "log_ppl_diff", "verl_is_mean")


@pytest.mark.parametrize("generator", ["laplace", "mixed"])
def test_coverage_with_heavy_tailed_prompts(generator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small part of the table of validation/coverage.py: 64 prompts, 200 pairs, so ±1.5 % per metric."""
    benchmark = load_coverage(monkeypatch)
    truths = {key: value for key, value in benchmark.truth(generator, 20_000).items() if key in HARD_KEYS + EASY_KEYS}
    cells = benchmark.coverage((generator, 64, truths), 200)
    covered = {key: round(1 - cell.wrong, 3) for key, cell in cells.items()}
    assert max(cell.withheld for cell in cells.values()) <= 0.2, cells
    assert set(covered) == set(HARD_KEYS + EASY_KEYS)
    for keys in (HARD_KEYS, EASY_KEYS):
        assert 0.925 <= np.mean([covered[key] for key in keys]) <= 0.98, covered
    assert min(covered.values()) >= 0.9, covered
    assert max(covered.values()) <= 0.99, covered


def test_truths_agree_with_closed_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal d of standard deviation s and mean −s²/2: k1 = s²/2, χ² = exp(s²) − 1, ESS = exp(−s²), E[ρ] = 1.

    Laplace d of scale s: E|d| = s, E d² = 2s², E k3 = s²/(1 − s²).
    """
    benchmark = load_coverage(monkeypatch)
    truths, s = benchmark.truth("gaussian", 20_000), 0.05
    expected = {
        "rms_logprob_diff": np.sqrt(s**2 + s**4 / 4),
        "kl_k1": s**2 / 2,
        "chi2_token": np.expm1(s**2),
        "ess_token": np.exp(-(s**2)),
        "mean_ratio": 1.0,
        "kl_seq": 59.5 * s**2 / 2,
    }
    assert {key: truths[key] for key in expected} == pytest.approx(expected, rel=0.04)
    truths, generators = benchmark.truth("laplace", 20_000), sys.modules["generators"]
    scales_, shares = 0.01 * np.outer(generators.PROMPT_SCALE, [1, 8]), np.outer(generators.PROMPT_SHARE, [0.95, 0.05])
    expected = {
        "mean_abs_logprob_diff": (shares * scales_).sum(),
        "kl_k2": (shares * scales_**2).sum(),
        "kl_k3": (shares * scales_**2 / (1 - scales_**2)).sum(),
    }
    assert {key: truths[key] for key in expected} == pytest.approx(expected, rel=0.03)


@given(arrays(np.float64, 20, elements=st.floats(-10, 10, width=16)))
def test_excess_kurtosis_is_that_of_scipy(values: np.ndarray) -> None:
    if np.ptp(values) < 1e-3:
        assert excess_kurtosis(np.zeros(20)) == 0.0
        return
    expected = stats.kurtosis(values, bias=False)
    assert excess_kurtosis(values) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert excess_kurtosis(1e-200 * values) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_degrees_of_freedom_of_known_laws() -> None:
    """A normal variance of P values has P − 1; kurtosis 6 (Laplace has 3) leaves a quarter of P; none leaves more."""
    assert degrees_of_freedom(0.0, 64) == 63
    assert degrees_of_freedom(6.0, 64) == 16
    assert degrees_of_freedom(-1.5, 64) == degrees_of_freedom(-2.5, 64) == 63


@given(
    st.floats(-5, 5),
    st.floats(1e-3, 10),
    st.floats(2, 1000),
    st.floats(1, 5),
    st.floats(1, 5),
    st.floats(-20, 20),
)
def test_p_value_says_what_the_limits_say(
    centre: float, se: float, degrees: float, low: float, high: float, null: float
) -> None:
    inference = Inference(centre, se, degrees, 16, low, high)
    p, (lower, upper) = inference.p_value(null), inference.limits
    assert p is not None
    assert 0 <= p <= 1
    if min(abs(null - lower), abs(null - upper)) > 1e-9:
        assert (p < 0.05) == (not lower <= null <= upper)
    assert inference.p_value(centre) == 1.0
    assert inference.p_value(lower) == pytest.approx(0.05)


@given(arrays(np.float64, 24, elements=st.floats(-1, 1, width=16)))
def test_the_bootstrap_never_shortens_cluster_t(make_pair: Any, d: np.ndarray) -> None:
    one = estimate("kl_k1", make_pair(-1.0, d))
    inference = infer({"m": one}, seed=0, replicates=60)["m"]
    assert inference.se == pytest.approx(d.std(ddof=1) / np.sqrt(24), rel=1e-9, abs=1e-12)
    half = special.stdtrit(23, 0.975) * inference.se
    low, high = inference.limits
    assert inference.centre - low >= half * (1 - 1e-9)
    assert high - inference.centre >= half * (1 - 1e-9)


def test_independent_prompts_agree_with_the_textbook_interval(make_pair: Any) -> None:
    """Normal d, one token per prompt: the studentised bootstrap must come close to mean ± t·s/√n."""
    d = np.random.default_rng(7).normal(0.3, 1.0, 400)
    got = evaluate({"k1": estimate("kl_k1", make_pair(-1.0, d))}, seed=0, replicates=4000)["k1"]
    half = special.stdtrit(399, 0.975) * d.std(ddof=1) / 20
    assert (got.ci_low, got.ci_high) == pytest.approx((-d.mean() - half, -d.mean() + half), abs=0.1 * half)


def test_correlated_tokens_widen_the_interval(make_pair: Any) -> None:
    """50 copies of each token within a prompt carry no more information than one."""
    d = np.random.default_rng(8).normal(0, 1.0, 100)

    def width(pair: Any) -> float:
        cell = evaluate({"m": estimate("mean_abs_logprob_diff", pair)}, seed=0, replicates=300)
        return (cell["m"].ci_high or 0) - (cell["m"].ci_low or 0)

    assert width(make_pair(-1.0, np.repeat(d, 50), [50] * 100)) == pytest.approx(width(make_pair(-1.0, d)), rel=1e-9)


def test_chunks_do_not_change_the_replicates(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = {"m": estimate("kl_k3", make_pair(-1.0, np.random.default_rng(9).normal(0, 1, 50)))}
    whole = evaluate(estimates, seed=3, replicates=101)["m"]
    monkeypatch.setattr(intervals, "_CHUNK_ELEMENTS", 350)
    parts = evaluate(estimates, seed=3, replicates=101)["m"]
    assert (parts.ci_low, parts.ci_high) == pytest.approx((whole.ci_low, whole.ci_high), rel=1e-12)


def test_few_prompts_that_differ_fall_back_to_cluster_t(make_pair: Any) -> None:
    """A seventh of the replicates miss both prompts and have no logarithm."""
    d = np.zeros(64)
    d[[10, 20]] = 0.5
    cell = evaluate({"m": estimate("mean_abs_logprob_diff", make_pair(0.0, d))}, seed=0, replicates=200)["m"]
    mean, degrees = 1 / 64, 2 * 64 / (stats.kurtosis(d, bias=False) + 2)
    factor = np.exp(special.stdtrit(degrees, 0.975) * d.std(ddof=1) / 8 / mean)
    assert (cell.value, cell.ci_low, cell.ci_high) == pytest.approx((mean, mean / factor, mean * factor), rel=1e-9)


def test_few_prompts_use_cluster_t(make_pair: Any) -> None:
    """Equal prompts on a linear scale: the t interval of the prompt means."""
    d = np.array([[0.1, 0.3], [-0.2, 0.1], [0.4, 0.4], [0.0, -0.3]])
    cell = evaluate({"m": estimate("kl_k1", make_pair(0.0, d.ravel(), [2] * 4))}, seed=0, replicates=50)["m"]
    means = -d.mean(axis=1)
    half = special.stdtrit(3, 0.975) * means.std(ddof=1) / 2
    assert (cell.ci_low, cell.ci_high) == pytest.approx((means.mean() - half, means.mean() + half))


def test_interval_leans_towards_the_long_tail(make_pair: Any) -> None:
    """A sample of a right-skewed law is more likely to have missed its large values than its small ones."""
    d = -(np.random.default_rng(4).exponential(1.0, 64) ** 2)
    cell = evaluate({"m": estimate("kl_k1", make_pair(0.0, d))}, seed=0, replicates=2000)["m"]
    assert cell.value is not None
    assert cell.ci_low is not None
    assert cell.ci_high is not None
    assert cell.ci_high - cell.value > 1.3 * (cell.value - cell.ci_low)


@pytest.mark.parametrize(
    ("working", "means"),
    [
        (scales.log_root_mean, [0.3]),
        (scales.log_mean_exp(0.0), [1e-9]),
        (scales.log_mean_exp(30.0), [0.2]),
        (scales.log_variance, [0.1, 0.4]),
        (scales.log_squared_variation(1.0), [0.1, 0.4]),
        (scales.log_one_minus_correlation, [0.015, 0.005, 0.625, 0.425, 0.525, 0.01, 0.02, 0.3, 0.1]),
        (scales.log_one_minus_correlation, [0.015, 0.005, 0.625, 0.125, 0.525, 0.01, 0.02, 0.9, 0.1]),
        (scales.slope, [0.1, 0.2, 0.5, 0.3]),
        (scales.intercept(1.0, 2.0), [0.1, 0.2, 0.5, 0.3]),
    ],
)
def test_complex_step_matches_central_differences(working: Any, means: list[float]) -> None:
    point = np.array([means])
    gradient = intervals._gradient(working, point)[0]
    for k, mean in enumerate(means):
        step = 1e-6 * abs(mean)
        up, down = point.copy(), point.copy()
        up[0, k] += step
        down[0, k] -= step
        assert gradient[k] == pytest.approx(float((working(up) - working(down))[0]) / (2 * step), rel=1e-4)


def test_share_of_independent_rows_is_clopper_pearson() -> None:
    hits, counts = np.zeros(100), np.ones(100)
    hits[:7] = 1
    low, high = share_interval(hits, counts) or (np.nan, np.nan)
    exact = special.betaincinv(7, 94, 0.025), special.betaincinv(8, 93, 0.975)
    assert (low, high) == pytest.approx(exact, abs=2e-3)


def test_share_limits_at_the_ends() -> None:
    assert share_interval(np.zeros(10), np.full(10, 10.0)) == pytest.approx((0.0, 1 - 0.025 ** (1 / 100)))
    assert share_interval(np.full(10, 10.0), np.full(10, 10.0)) == pytest.approx((0.025 ** (1 / 100), 1.0))
    assert share_interval(np.array([1.0]), np.array([5.0])) is None


def test_clustered_hits_widen_the_share_interval() -> None:
    spread, lumped = np.full(50, 2.0), np.zeros(50)
    lumped[:5] = 20
    counts = np.full(50, 20.0)
    narrow, wide = share_interval(spread, counts), share_interval(lumped, counts)
    assert narrow is not None
    assert wide is not None
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_quantile_interval_of_independent_rows_matches_order_statistics() -> None:
    values = (np.arange(2000) + 0.5) / 2000
    value, interval = quantile_interval(values, np.arange(2000), np.ones(2000, np.int64), 0.99)
    assert value == pytest.approx(0.99, abs=1e-3)
    assert interval == pytest.approx(
        (1 - special.betaincinv(21, 1980, 0.975), 1 - special.betaincinv(20, 1981, 0.025)), abs=1e-3
    )


def test_quantile_coverage(make_pair: Any) -> None:
    rng, rounds, hits = np.random.default_rng(11), 300, 0
    truth = float(special.ndtri(0.995))  # 99 % quantile of |N(0, 1)|
    for _ in range(rounds):
        _, interval = quantile_interval(np.abs(rng.normal(0, 1, 3000)), np.arange(100), np.full(100, 30), 0.99)
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    assert 0.92 <= hits / rounds <= 0.99


def test_poisson_interval_of_known_counts() -> None:
    assert poisson_interval(0) == pytest.approx((0.0, 3.6889), abs=1e-4)
    assert poisson_interval(10) == pytest.approx((4.7954, 18.3904), abs=1e-4)


def test_rare_share_is_poisson_unless_its_hits_come_in_clusters() -> None:
    counts = np.full(100, 1000.0)
    spread, lumped = np.zeros(100), np.zeros(100)
    spread[:10], lumped[:2] = 1.0, 5.0
    exact = tuple(limit / 1e5 for limit in poisson_interval(10))
    assert rare_share_interval(spread, counts) == pytest.approx(exact, rel=0.1)
    low, high = rare_share_interval(lumped, counts)
    assert low < exact[0]
    assert high > 1.3 * exact[1]
    nothing = rare_share_interval(np.zeros(100), counts)
    assert nothing == pytest.approx((0.0, 3.6889e-5), rel=1e-4)
    assert rare_share_interval(np.array([2.0]), np.array([50.0])) == tuple(x / 50 for x in poisson_interval(2))
