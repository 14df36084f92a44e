"""Interval machinery: shares, quantiles, Poisson counts, gradients, chunks, and coverage under heavy tails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special

from mismatch_probe.metrics import intervals, scales
from mismatch_probe.metrics.intervals import Estimate, evaluate, poisson_interval, quantile_interval, share_interval
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.sample import finite_tokens
from mismatch_probe.metrics.token import token_metrics
from mismatch_probe.types import PairArrays


def estimate(key: str, pair: PairArrays) -> Estimate:
    result = token_metrics()[key](finite_tokens(pair))
    assert isinstance(result, Estimate)
    return result


COVERED = ("mean_abs_logprob_diff", "rms_logprob_diff", "kl_k3")


def heavy_tailed(make_pair: Any, n_prompts: int, rng: np.random.Generator) -> tuple[Any, Any, dict[str, float]]:
    """Laplace tokens whose scale varies by prompt (0.3 … 2.5) and by token (5 % are 8 times larger), and the truth.

    For a Laplace d of scale s: E|d| = s, E d² = 2s², E k3 = s²/(1 − s²).
    """
    base, p_base = 0.01 * np.array([0.3, 0.6, 1.0, 1.5, 2.5]), np.array([0.15, 0.25, 0.3, 0.2, 0.1])
    factor, p_factor = np.array([1.0, 8.0]), np.array([0.95, 0.05])
    lengths = rng.integers(20, 120, n_prompts)
    scale = np.repeat(rng.choice(base, n_prompts, p=p_base), lengths)

    def log_ratio(divisor: float) -> np.ndarray:
        token_factor = rng.choice(factor, len(scale), p=p_factor)
        return np.asarray(rng.laplace(0, 1, len(scale)) * scale * token_factor / divisor)

    s = np.outer(base, factor).ravel()
    p = np.outer(p_base, p_factor).ravel()
    truth = {
        "mean_abs_logprob_diff": float(p @ s),
        "rms_logprob_diff": float(np.sqrt(p @ (2 * s**2))),
        "kl_k3": float(p @ (s**2 / (1 - s**2))),
    }
    wide, narrow = (make_pair(-1.0, log_ratio(divisor), list(lengths)) for divisor in (1.0, 8.0))
    return wide, narrow, truth


def measured_coverage(make_pair: Any, n_prompts: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(2024)
    hits = dict.fromkeys((*COVERED, "ratio"), 0)
    for _ in range(rounds):
        wide, narrow, truth = heavy_tailed(make_pair, n_prompts, rng)
        results = evaluate({key: estimate(key, wide) for key in COVERED}, seed=0, replicates=500)
        results["ratio"] = paired_ratio(wide, narrow, "mean_abs_logprob_diff", replicates=500)
        for key, result in results.items():
            assert result.ci_low is not None
            assert result.ci_high is not None
            hits[key] += result.ci_low <= {**truth, "ratio": 8.0}[key] <= result.ci_high
    return {key: count / rounds for key, count in hits.items()}


def test_coverage_with_heavy_tailed_prompts(make_pair: Any) -> None:
    """Squares are set by the few prompts with the largest scale, so their intervals fall a little short of 95 %."""
    coverage = measured_coverage(make_pair, n_prompts=64, rounds=250)
    for key, floor in (("mean_abs_logprob_diff", 0.92), ("ratio", 0.92), ("rms_logprob_diff", 0.88), ("kl_k3", 0.88)):
        assert floor <= coverage[key] <= 0.99, coverage


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


def test_one_prompt_that_differs_falls_back_to_cluster_t(make_pair: Any) -> None:
    """A third of the replicates miss that prompt and have no logarithm. The relative standard error is exactly 1."""
    d = np.zeros(64)
    d[10] = 0.5
    cell = evaluate({"m": estimate("mean_abs_logprob_diff", make_pair(0.0, d))}, seed=0, replicates=200)["m"]
    mean, factor = 0.5 / 64, np.exp(special.stdtrit(63, 0.975))
    assert (cell.value, cell.ci_low, cell.ci_high) == pytest.approx((mean, mean / factor, mean * factor), rel=1e-12)


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
    value, interval = quantile_interval(values, np.arange(2000), 0.99)
    assert value == pytest.approx(0.99, abs=1e-3)
    assert interval == pytest.approx(
        (1 - special.betaincinv(21, 1980, 0.975), 1 - special.betaincinv(20, 1981, 0.025)), abs=1e-3
    )


def test_quantile_coverage(make_pair: Any) -> None:
    rng, rounds, hits = np.random.default_rng(11), 300, 0
    truth = float(special.ndtri(0.995))  # 99 % quantile of |N(0, 1)|
    for _ in range(rounds):
        _, interval = quantile_interval(np.abs(rng.normal(0, 1, 3000)), np.repeat(np.arange(100), 30), 0.99)
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    assert 0.92 <= hits / rounds <= 0.99


def test_poisson_interval_of_known_counts() -> None:
    assert poisson_interval(0) == pytest.approx((0.0, 3.6889), abs=1e-4)
    assert poisson_interval(10) == pytest.approx((4.7954, 18.3904), abs=1e-4)
