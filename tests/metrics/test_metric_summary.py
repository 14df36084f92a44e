"""What a summary says about pairs that are off-policy, partly non-finite, empty, or small."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from mismatch_probe.metrics.catalog import CATALOG, calibrated_prompts
from mismatch_probe.metrics.intervals import NO_INTERVAL, UNCALIBRATED
from mismatch_probe.metrics.sample import count_excluded
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import PairArrays

SURVIVES_OFF_POLICY = {
    "mean_abs_logprob_diff",
    "rms_logprob_diff",
    "p99_abs_logprob_diff",
    "max_abs_logprob_diff",
    "mean_abs_prob_diff",
    "std_prob_diff",
    "max_abs_prob_diff",
    "pearson_prob",
    "kl_k2",
    "kl_k3",
    "token_mult_prob_error",
    "js_k3",
    "frac_outside_clip",
    "confident_disagreement_rate",
    "confident_disagreement_count",
    "seq_log_ratio_std",
    "seq_log_ratio_min",
    "seq_log_ratio_max",
    "seq_mult_prob_error_max",
    "frac_ratio_beyond_2",
    "frac_bitwise_equal",
    "kl_entropy_ratio",
    "binary_tv",
    "binary_kl",
    "tail_slope",
    "logprob_slope",
    "logprob_offset",
    "logprob_slope_seq_p10",
    "logprob_slope_seq_p90",
    "seq_max_token_kl_p50",
    "seq_max_token_kl_p90",
    "seq_max_token_kl_max",
}


@pytest.fixture
def noisy(make_pair: Any) -> Any:
    rng = np.random.default_rng(5)
    lengths = rng.integers(5, 60, 240)
    n = int(lengths.sum())

    def make(**options: Any) -> PairArrays:
        prompts = [i // 4 for i in range(240)]
        pair = make_pair(-rng.exponential(1, n), rng.normal(0, 0.05, n), list(lengths), prompts, **options)
        entropy = {"entropy": rng.exponential(1, n), "rollout_entropy": rng.exponential(1, n)}
        return replace(cast(PairArrays, pair), columns=entropy)

    return make


def test_off_policy_metrics_are_null_with_the_reason(noisy: Any) -> None:
    metrics = compute_metrics(noisy(on_policy=False, off_policy_why="sampled at temperature 0.7"), replicates=20)
    valued = {key for key, metric in metrics.items() if metric.value is not None}
    assert valued == SURVIVES_OFF_POLICY
    sampled = {key for key, info in CATALOG.items() if info.level != "exact"}
    assert {metrics[key].why for key in sampled - valued} == {"sampled at temperature 0.7"}


def test_off_policy_without_a_reason_still_gives_one(noisy: Any) -> None:
    assert "did not sample" in compute_metrics(noisy(on_policy=False), replicates=20)["kl_k1"].why


def test_intervals_appear_where_the_catalog_says(noisy: Any) -> None:
    metrics = compute_metrics(noisy(), replicates=50)
    with_interval = {key for key, metric in metrics.items() if metric.ci_low is not None}
    sampled = {key for key, info in CATALOG.items() if info.level != "exact"}
    assert with_interval == {key for key in sampled if CATALOG[key].has_interval}
    for key, metric in ((key, metrics[key]) for key in sampled):
        if metric.ci_low is not None:
            assert metric.value is not None
            assert metric.ci_high is not None
            assert metric.ci_low <= metric.value <= metric.ci_high
            needed = calibrated_prompts(key)  # of 60
            few = "" if needed <= 60 else f"uncalibrated: fewer than {needed} prompts"
            assert metric.why.endswith(few)
            left_out = metric.why.startswith(("over the", "infinite at"))  # short sequences, certain tokens
            assert few or left_out or not metric.why


def test_identical_policies_give_exact_zeros_and_ones(make_pair: Any) -> None:
    b = np.log(np.linspace(0.05, 0.95, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = make_pair(b, np.zeros(400), [10] * 20 + [5] * 40)
        entropy = {"entropy": 0.5 - b, "rollout_entropy": 0.5 - b}
        metrics = compute_metrics(replace(pair, columns=entropy), replicates=100)
    one = {"pearson_prob", "token_mult_prob_error", "ess_token", "mean_ratio", "ess_seq", "ess_seq_gaussian"}
    one |= {"ess_seq_truncated", "verl_is_mean", "verl_ess", "ppl_ratio", "seq_mult_prob_error_max"}
    one |= {"logprob_slope", "logprob_slope_seq_p10", "logprob_slope_seq_p90", "temperature_rollout_side"}
    one |= {"temperature_trainer_side", "mean_inverse_ratio", "winsorised_ratio", "winsorised_inverse_ratio"}
    # A share of zero still has an upper limit, and one of all a lower one.
    bounds = {"frac_outside_clip", "confident_disagreement_rate", "frac_ratio_beyond_2"}
    for key, metric in metrics.items():
        if key == "pareto_k" or CATALOG[key].level == "exact":
            continue
        expected = 1.0 if key in one | {"frac_bitwise_equal"} else 0.0
        assert metric.value == expected, key
        if CATALOG[key].has_interval and key not in bounds | {"frac_bitwise_equal"}:
            assert (metric.ci_low, metric.ci_high) == (expected, expected), key
    assert all(metrics[key].ci_low == 0 and 0 < (metrics[key].ci_high or 0) < 0.01 for key in bounds)
    equal = metrics["frac_bitwise_equal"]
    assert 0.99 < (equal.ci_low or 0) < 1 == equal.ci_high


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["rollout_logprob", "trainer_logprob"])
def test_nonfinite_tokens_and_their_sequences_are_left_out(make_pair: Any, bad: float, side: str) -> None:
    d = np.linspace(-0.2, 0.3, 12)
    pair = make_pair(-1.0, d, [3, 3, 3, 3])
    getattr(pair, side)[4] = bad
    assert count_excluded(pair) == 1
    metrics = compute_metrics(pair, replicates=20)
    mean, total = metrics["mean_abs_logprob_diff"], metrics["seq_log_ratio_mean"]
    assert mean.value == pytest.approx(np.abs(np.delete(d, 4)).mean())
    assert mean.why.startswith("computed over the 11 of 12 tokens with usable log-probs")
    assert total.value == pytest.approx(np.delete(d.reshape(4, 3).sum(1), 1).mean())
    assert total.why.startswith("computed over the 3 of 4 sequences with usable log-probs")


def test_no_finite_sequence_and_no_finite_token(make_pair: Any) -> None:
    pair = make_pair(-1.0, [0.1, np.nan], [2])
    metrics = compute_metrics(pair)
    assert metrics["max_abs_logprob_diff"].value == pytest.approx(0.1)
    assert metrics["kl_seq"].why == "none of the 1 sequences has usable log-probs throughout"
    metrics = compute_metrics(make_pair(-1.0, [np.nan, np.inf], [2]))
    assert all(metric.value is None and metric.why for metric in metrics.values())
    assert metrics["kl_k3"].why == "none of the 2 tokens has usable log-probs"


def test_no_tokens(make_pair: Any) -> None:
    metrics = compute_metrics(make_pair([], [], []))
    assert list(metrics) == list(CATALOG)
    assert {(metric.value, metric.why) for metric in metrics.values()} == {(None, "there are no response tokens")}
    assert count_excluded(make_pair([], [], [])) == 0


def test_one_prompt_has_values_but_no_intervals(make_pair: Any) -> None:
    metrics = compute_metrics(make_pair(-1.0, [0.1, -0.2, 0.3, 0.1], [1, 3], prompts=[0, 0]))
    for key in ("mean_abs_logprob_diff", "p99_abs_logprob_diff", "frac_outside_clip", "kl_seq"):
        assert metrics[key].value is not None
        assert metrics[key].ci_low is None, key
        assert metrics[key].why == NO_INTERVAL, key


@pytest.mark.parametrize(("n_prompts", "marked"), [(2, True), (8, True), (31, True), (32, False)])
def test_few_prompts_are_marked_uncalibrated(make_pair: Any, n_prompts: int, marked: bool) -> None:
    rng = np.random.default_rng(1)
    metrics = compute_metrics(make_pair(-1.0, rng.normal(0, 0.1, 10 * n_prompts), [10] * n_prompts))
    for key in ("mean_abs_logprob_diff", "frac_outside_clip", "kl_seq"):
        assert metrics[key].ci_low is not None
        assert (metrics[key].why == UNCALIBRATED) is marked
    for key in ("p99_abs_logprob_diff", "seq_log_ratio_std", "chi2_seq"):
        if metrics[key].ci_low is not None:
            assert metrics[key].why == "uncalibrated: fewer than 64 prompts"
    assert UNCALIBRATED == "uncalibrated: fewer than 32 prompts"


def test_same_seed_same_interval(noisy: Any) -> None:
    pair = noisy()
    assert compute_metrics(pair, replicates=50) == compute_metrics(pair, replicates=50)
    first, second = (compute_metrics(pair, replicates=50, seed=seed)["kl_k3"] for seed in (0, 1))
    assert first.value == second.value
    assert first.ci_low != second.ci_low
