"""Sequence metrics: closed forms, the formulas of verl and NeMo-RL on padded matrices, and the edges of float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import special

from mismatch_probe.metrics.summary import compute_metrics, pareto_k_threshold


def values(pair: Any) -> dict[str, float | None]:
    return {key: metric.value for key, metric in compute_metrics(pair, replicates=20).items()}


def test_gaussian_sequences(make_pair: Any) -> None:
    """D ~ N(−s²/2, s²): χ² = exp(s²) − 1 and both ESS = exp(−s²)."""
    n, s = 20_001, 0.5
    d = s * special.ndtri((np.arange(n) + 0.5) / n) - s**2 / 2
    got = values(make_pair(-1.0, d))
    want = {
        "seq_log_ratio_mean": -(s**2) / 2,
        "seq_log_ratio_std": s,
        "kl_seq": s**2 / 2,
        "chi2_seq": math.expm1(s**2),
        "ess_seq": math.exp(-(s**2)),
        "ess_seq_gaussian": math.exp(-(s**2)),
    }
    assert {key: got[key] for key in want} == pytest.approx(want, rel=2e-3)


def test_slope_recovers_a_line(make_pair: Any) -> None:
    lengths = [10, 200, 300, 450, 1000]
    totals = [0.5 - 0.002 * length for length in lengths]
    d = np.concatenate([np.full(length, total / length) for length, total in zip(lengths, totals, strict=True)])
    got = values(make_pair(-1.0, d, lengths=lengths))
    assert got["seq_log_ratio_slope_per_1k"] == pytest.approx(-2.0)
    assert got["seq_log_ratio_intercept"] == pytest.approx(0.5)
    assert got["seq_log_ratio_rate_per_1k"] == pytest.approx(1000 * sum(totals) / sum(lengths))


def test_equal_lengths_have_no_slope(make_pair: Any) -> None:
    metrics = compute_metrics(make_pair(-1.0, np.linspace(-0.1, 0.1, 100), lengths=[10] * 10))
    for key in ("seq_log_ratio_slope_per_1k", "seq_log_ratio_intercept"):
        assert metrics[key].value is None
        assert "hardly vary" in metrics[key].why
    assert metrics["seq_log_ratio_rate_per_1k"].value is not None


def test_frameworks_formulas_on_padded_matrices(make_pair: Any) -> None:
    """verl and NeMo-RL take masked means over `[S, T]`; written that way, the numbers are the same."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, 25)
    mask = np.arange(30) < lengths[:, None]
    b = np.where(mask, -rng.exponential(1.0, mask.shape), 0.0)
    d = np.where(mask, rng.normal(0, 0.2, mask.shape), 0.0)
    a, total = b + d, d.sum(axis=1)

    def masked(x: np.ndarray) -> float:
        return float((x * mask).sum() / mask.sum())

    truncated = np.broadcast_to(np.minimum(np.exp(total), 2.0)[:, None], mask.shape)
    gaps = np.abs(np.exp(a) - np.exp(b))[mask]
    gap = (b * mask).sum(1) / lengths - (a * mask).sum(1) / lengths
    m = np.log(0.5 * np.exp(a) + 0.5 * np.exp(b))
    want = {
        "verl_is_mean": masked(truncated),
        "verl_is_std": math.sqrt(masked(truncated**2) - masked(truncated) ** 2),
        "verl_ess": 1 / masked((truncated / masked(truncated)) ** 2),
        "chi2_seq": float((np.exp(total) ** 2).mean() - 1),
        "chi2_token": masked(np.exp(d) ** 2) - 1,
        "kl_k1": masked(b - a),
        "kl_k3": masked(np.exp(d) - d - 1),
        "log_ppl_diff": float(gap.mean()),
        "ppl_ratio": float(np.exp(gap).mean()),
        "mean_abs_prob_diff": float(gaps.mean()),
        "std_prob_diff": float(gaps.std(ddof=1)),
        "max_abs_prob_diff": float(gaps.max()),
        "pearson_prob": float(np.corrcoef(np.exp(a)[mask], np.exp(b)[mask])[0, 1]),
        "token_mult_prob_error": masked(np.exp(np.abs(d))),
        "seq_mult_prob_error_max": float(((np.exp(np.abs(d)) * mask).sum(1) / lengths).max()),
        "js_k3": masked(0.5 * (np.exp(a - m) - (a - m) - 1) + 0.5 * (np.exp(b - m) - (b - m) - 1)),
    }
    got = values(make_pair(b[mask], d[mask], lengths=list(lengths)))
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-10)


def test_truncated_ess(make_pair: Any) -> None:
    total = np.array([-3.0, -0.2, 0.1, 5.0])
    w = np.minimum(np.exp(total), 2.0)
    assert values(make_pair(-6.0, total))["ess_seq_truncated"] == pytest.approx(w.sum() ** 2 / (4 * (w**2).sum()))


def test_huge_sequence_ratios(make_pair: Any) -> None:
    metrics = compute_metrics(make_pair(-3000.0, [2000.0, -2000.0, 0.0, 0.0]), replicates=50)
    assert metrics["chi2_seq"].value is None
    assert "overflows" in metrics["chi2_seq"].why
    assert metrics["verl_is_mean"].value == pytest.approx((2 + 0 + 1 + 1) / 4)
    assert metrics["ess_seq"].value == pytest.approx(0.25)
    assert metrics["ess_seq_gaussian"].value == 0.0
    assert metrics["verl_ess"].value == pytest.approx((2 + 0 + 1 + 1) ** 2 / (4 * (4 + 0 + 1 + 1)))
    assert metrics["seq_log_ratio_min"].value == -2000.0
    assert metrics["seq_log_ratio_max"].value == 2000.0
    assert all(m.value is None or math.isfinite(m.value) for m in metrics.values())


def test_largest_sequence_error_survives_where_its_sum_overflows(make_pair: Any) -> None:
    got = values(make_pair(-800.0, [712.0] + [0.0] * 99, lengths=[100]))
    assert got["seq_mult_prob_error_max"] == pytest.approx(math.exp(712 - math.log(100)), rel=1e-10)


def test_small_ess_is_flagged(make_pair: Any) -> None:
    flagged = compute_metrics(make_pair(-9.0, [5.0] + [0.0] * 99), replicates=20)["ess_seq"]
    calm = compute_metrics(make_pair(-9.0, [0.1] + [0.0] * 99), replicates=20)["ess_seq"]
    assert "below 10" in flagged.why
    assert "below 10" not in calm.why


def test_pareto_k_needs_sequences_and_spread(make_pair: Any) -> None:
    rng = np.random.default_rng(0)
    few = compute_metrics(make_pair(-1.0, rng.normal(0, 1, 199)), replicates=20)["pareto_k"]
    calm = compute_metrics(make_pair(-1.0, rng.normal(0, 1e-3, 500)), replicates=20)["pareto_k"]
    assert few.value is None
    assert "200 sequences" in few.why
    assert calm.value is None
    assert "negligible" in calm.why


def test_pareto_k_finds_the_tail_index(make_pair: Any) -> None:
    """Weights with a Pareto tail of index 1/k have k̂ near k; bounded weights have a negative one."""
    uniform = (np.arange(4000) + 0.5) / 4000
    heavy = compute_metrics(make_pair(-20.0, -0.9 * np.log(uniform)), replicates=20)["pareto_k"]
    bounded = compute_metrics(make_pair(-20.0, np.log1p(uniform)), replicates=20)["pareto_k"]
    assert heavy.value == pytest.approx(0.9, abs=0.1)
    assert "unreliable" in heavy.why
    assert bounded.value is not None
    assert bounded.value < 0
    assert bounded.why == ""


def test_pareto_threshold_falls_with_few_sequences() -> None:
    assert pareto_k_threshold(200) == pytest.approx(1 - 1 / math.log10(200))
    assert pareto_k_threshold(100_000) == 0.7


def test_a_tail_that_float64_cannot_hold_has_no_pareto_k(make_pair: Any) -> None:
    metric = compute_metrics(make_pair(-1e6, np.linspace(-4e5, 4e5, 300)), replicates=20)["pareto_k"]
    assert metric.value is None
    assert "float64" in metric.why


def test_empty_sequences_do_not_count(make_pair: Any) -> None:
    with_empty = compute_metrics(make_pair(-1.0, [0.1, 0.2, 0.3], lengths=[2, 0, 1]), replicates=20)
    without = compute_metrics(make_pair(-1.0, [0.1, 0.2, 0.3], lengths=[2, 1]), replicates=20)
    assert with_empty == without
