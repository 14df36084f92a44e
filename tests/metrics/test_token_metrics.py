"""Token metrics against closed forms, high-precision arithmetic and the edges of float64."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from scipy import special

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.accumulate import accumulate
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.intervals import poisson_interval
from mismatch_probe.metrics.scales import k3
from mismatch_probe.metrics.summary import compute_metrics


def values(pair: Any, **options: Any) -> dict[str, float | None]:
    sums = accumulate([pair], **options)
    return {key: metric.value for key, metric in compute_metrics(sums, replicates=20).items()}


def test_two_point_distribution(make_pair: Any) -> None:
    """A quarter of the tokens at d = +x, the rest at −y: every mean can be written down."""
    x, y, b = 0.3, 0.1, -1.0
    d = np.tile([x, -y, -y, -y], 50)
    got = values(make_pair(b, d))
    gap_x, gap_y = math.exp(b) * math.expm1(x), -math.exp(b) * math.expm1(-y)
    mean_ratio = 0.25 * math.exp(x) + 0.75 * math.exp(-y)
    mean_square = 0.25 * math.exp(2 * x) + 0.75 * math.exp(-2 * y)
    want = {
        "mean_abs_logprob_diff": 0.25 * x + 0.75 * y,
        "rms_logprob_diff": math.sqrt(0.25 * x**2 + 0.75 * y**2),
        "p99_abs_logprob_diff": x,
        "max_abs_logprob_diff": x,
        "mean_abs_prob_diff": 0.25 * gap_x + 0.75 * gap_y,
        "std_prob_diff": math.sqrt(0.25 * 0.75 * 200 / 199) * (gap_x - gap_y),
        "max_abs_prob_diff": gap_x,
        "kl_k1": -0.25 * x + 0.75 * y,
        "kl_k2": 0.5 * (0.25 * x**2 + 0.75 * y**2),
        "kl_k3": mean_ratio - 1 - (0.25 * x - 0.75 * y),
        "token_mult_prob_error": 0.25 * math.exp(x) + 0.75 * math.exp(y),
        "chi2_token": mean_square - 1,
        "ess_token": mean_ratio**2 / mean_square,
        "mean_ratio": mean_ratio,
        "frac_outside_clip": 0.25,
        "confident_disagreement_rate": 0.0,
        "confident_disagreement_count": 0.0,
    }
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-12)


def test_gaussian_log_ratio(make_pair: Any) -> None:
    """d ~ N(−s²/2, s²) is a martingale: E ρ = 1, k1 = k3 = s²/2, χ² = exp(s²) − 1, ESS = exp(−s²)."""
    n, s = 200_001, 0.1
    d = s * special.ndtri((np.arange(n) + 0.5) / n) - s**2 / 2
    got = values(make_pair(-1.0, d, lengths=[n]))
    want = {
        "mean_ratio": 1.0,
        "kl_k1": s**2 / 2,
        "kl_k2": s**2 / 2 + s**4 / 8,
        "kl_k3": s**2 / 2,
        "chi2_token": math.expm1(s**2),
        "ess_token": math.exp(-(s**2)),
    }
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-3)


def test_js_is_symmetric_and_matches_its_definition(make_pair: Any) -> None:
    a, b = -0.4, -1.9
    m = math.log(0.5 * math.exp(a) + 0.5 * math.exp(b))
    want = 0.5 * (math.exp(a - m) - 1 - (a - m)) + 0.5 * (math.exp(b - m) - 1 - (b - m))
    assert values(make_pair([b, a], [a - b, b - a]))["js_k3"] == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("d", [1e-12, -1e-7, 1e-7, 3e-5, -9.99e-4, 1.001e-3, -0.2, 1.5])
def test_k3_keeps_its_digits(d: float) -> None:
    """Written as float32 `exp(d) − 1 − d`, the answer at 1e-7 has no correct digit."""
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(d).exp() - 1 - Decimal(d)
    assert float(k3(np.array([d]))[0]) == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_fp32_sized_gaps_keep_their_digits_in_every_metric(make_pair: Any) -> None:
    e = 1e-7
    got = values(make_pair(np.tile([-0.5, -2.0], 50), np.tile([e, e, -e, -e], 25)))
    assert got["kl_k3"] == pytest.approx(e**2 / 2, rel=1e-6, abs=0)
    assert got["js_k3"] == pytest.approx(e**2 / 8, rel=1e-6, abs=0)
    assert got["chi2_token"] == pytest.approx(2 * e**2, rel=0.02, abs=0)  # b + d rounds d itself at 1e-16
    loss = 1 - got["ess_token"] if got["ess_token"] is not None else math.nan
    assert loss == pytest.approx(e**2, rel=0.02, abs=0)  # 1 − ESS is itself rounded at 1e-16
    assert got["token_mult_prob_error"] == pytest.approx(math.exp(e), abs=1e-15)
    probabilities = math.exp(-0.5), math.exp(-2.0)
    assert got["mean_abs_prob_diff"] == pytest.approx(e * sum(probabilities) / 2, rel=1e-7)


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_log_ratios_overflow_only_where_the_truth_does(make_pair: Any, sign: int) -> None:
    metrics = compute_metrics(make_pair(-2500.0, [sign * 2000.0] + [0.0] * 39), replicates=50)
    assert metrics["mean_abs_logprob_diff"].value == pytest.approx(50.0)
    assert metrics["token_mult_prob_error"].value is None
    assert "overflows" in metrics["token_mult_prob_error"].why
    if sign > 0:
        for key in ("kl_k3", "chi2_token", "mean_ratio"):
            assert metrics[key].value is None
            assert "overflows" in metrics[key].why
        assert metrics["ess_token"].value == pytest.approx(1 / 40)
    else:
        assert metrics["kl_k3"].value == pytest.approx(1999 / 40)
        assert metrics["mean_ratio"].value == pytest.approx(39 / 40)
        assert metrics["chi2_token"].value == pytest.approx(39 / 40 - 1)
        assert metrics["ess_token"].value == pytest.approx(39 / 40)


def test_sums_that_overflow_on_the_way_still_give_a_finite_mean(make_pair: Any) -> None:
    d = [350.0, 0.0]  # exp(2d) = 1e304 is finite, its square and the sum of many are not
    got = values(make_pair(-400.0, d))
    assert got["chi2_token"] == pytest.approx(math.exp(700 - math.log(2)), rel=1e-10)
    assert got["kl_k3"] == pytest.approx(math.exp(350) / 2, rel=1e-12)
    assert got["ess_token"] == pytest.approx(0.5)


def test_log_probs_far_above_zero_spoil_only_what_exponentiates_them(make_pair: Any) -> None:
    metrics = compute_metrics(make_pair([800.0, -1.0], [0.0, 0.5]), replicates=20)
    for key in ("mean_abs_prob_diff", "std_prob_diff", "max_abs_prob_diff", "pearson_prob"):
        assert metrics[key].value is None
        assert "a log-prob is 800" in metrics[key].why
    assert metrics["mean_abs_logprob_diff"].value == 0.25
    assert metrics["js_k3"].value is not None


def test_clip_range_is_an_option_and_is_checked(make_pair: Any) -> None:
    pair = make_pair(-1.0, np.log([0.85, 1.0, 1.25, 1.5]))
    assert values(pair)["frac_outside_clip"] == 0.25
    assert values(pair, clip=(0.9, 1.2))["frac_outside_clip"] == 0.75
    with pytest.raises(UsageError, match="0 < low < high"):
        accumulate([pair], clip=(0.0, 1.2))


def test_confident_disagreements_carry_their_poisson_interval(make_pair: Any) -> None:
    b = np.array([-0.1, -0.1, -0.1, -5.0] * 25)
    d = np.array([-3.0, -1.9, 0.0, -3.0] * 25)
    metrics = compute_metrics(make_pair(b, d))
    rate = metrics["confident_disagreement_rate"]
    low, high = poisson_interval(25)
    assert metrics["confident_disagreement_count"].value == 25
    assert rate.value == 0.25
    assert (rate.ci_low, rate.ci_high) == pytest.approx((low / 100, high / 100))


def test_constant_probabilities_have_no_correlation(make_pair: Any) -> None:
    metric = compute_metrics(make_pair(-1.0, [0.1, -0.1, 0.2]))["pearson_prob"]
    assert metric.value is None
    assert metric.why == "the probabilities do not vary"


def test_correlation_close_to_one_keeps_its_digits(make_pair: Any) -> None:
    b = np.log(np.linspace(0.1, 0.9, 41))
    d = 1e-6 * np.resize([1.0, -1.0, -1.0, 1.0], 41)
    value = values(make_pair(b, d))["pearson_prob"]
    x, y = np.exp(b) * np.exp(d), np.exp(b)
    assert value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-14)
    assert value is not None
    assert 0 < 1 - value < 1e-11


def test_catalog_lists_exactly_what_is_computed(make_pair: Any) -> None:
    metrics = compute_metrics(make_pair([-0.5, -1.0], [0.1, 0.2]))
    assert list(metrics) == list(CATALOG)
    assert all(info.key == key for key, info in CATALOG.items())


@pytest.mark.parametrize("spread", [1e-9, 1e-3, 1.0])
def test_correlation_of_sides_of_very_different_spread(make_pair: Any, spread: float) -> None:
    """A broken trainer gives every token nearly the same tiny probability; what little it varies still correlates."""
    rng = np.random.default_rng(0)
    rollout = rng.uniform(0.1, 0.9, 500)
    trainer = spread * (0.3 * rollout + 0.3 * rng.uniform(0, 1, 500))
    b = np.log(rollout)
    value = values(make_pair(b, np.log(trainer) - b))["pearson_prob"]
    assert value == pytest.approx(np.corrcoef(rollout, trainer)[0, 1], abs=1e-13)
