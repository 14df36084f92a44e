"""What few, tied, huge or broken data may not claim: properties over all metrics, and values that were once wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.exact import ExactRows, exact_metrics
from mismatch_probe.metrics.inference import TESTED_PROMPTS
from mismatch_probe.metrics.intervals import Estimate, evaluate, quantile_interval
from mismatch_probe.metrics.ladder import TokenPrompts, change
from mismatch_probe.metrics.paired import PAIRED_KEYS, compare_pairs
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import DIVERGENCES, MetricValue, PairArrays

# Metrics whose limits, both above 0, are compared by their ratio.
BY_FACTOR = {key for key, info in CATALOG.items() if info.positive} | {
    *("ess_token", "ess_seq", "ess_seq_gaussian", "ess_seq_truncated", "verl_ess", "mean_ratio", "ppl_ratio"),
}
KINDS = ("few", "ties", "zeros", "one prompt", "huge token", "deep", "abyss", "broken", "single tokens", "uneven")


def degenerate(kind: str, n_prompts: int, rng: np.random.Generator, make_pair: Any) -> PairArrays:
    """A pair of `n_prompts` prompts, most of them a sequence of 1 to 12 tokens, with one thing about it."""
    lengths = rng.integers(1, 13, n_prompts)
    if kind == "single tokens":
        lengths[:] = 1
    if kind == "one prompt":
        lengths[0] = max(9 * int(lengths[1:].sum()), 1)
    if kind == "uneven":
        lengths = np.maximum(1, (12 * rng.pareto(1.0, n_prompts)).astype(int) % 4000)
    n = int(lengths.sum())
    b, d = -rng.exponential(1.0, n), rng.laplace(0, 10.0 ** rng.uniform(-8, -0.5), n)
    if kind == "ties":
        d = np.round(d, 1)
    if kind == "zeros":
        d = np.where(rng.random(n) < 0.97, 0.0, d)
    if kind == "huge token":
        d[rng.integers(n)] = rng.choice([-1, 1]) * 10.0 ** rng.uniform(0, 2.7)
    if kind in ("deep", "abyss"):
        d += {"deep": -50.0, "abyss": -1000.0}[kind] / np.repeat(lengths, lengths)
    if kind == "broken":
        b[rng.random(n) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
    return make_pair(b, d, list(lengths))


def claims_too_much(key: str, metric: MetricValue, alike: bool, bounds: tuple[float, float]) -> str:
    """What is wrong about an interval; empty where nothing is."""
    if metric.ci_low is None or metric.ci_high is None:
        return ""
    low, high = metric.ci_low, metric.ci_high
    if not (np.isfinite([low, high]).all() and low <= (metric.value or 0.0) <= high):
        return "does not hold its value"
    if not bounds[0] <= low <= high <= bounds[1]:
        return "is out of bounds"
    if key in BY_FACTOR and high > 1e6 * low and low > 0:
        return "is wider than a factor of a million"
    if low == high and not alike:
        return "has no width"
    return ""


@given(st.sampled_from(KINDS), st.sampled_from([1, 2, 3, 5, 8, 15, 40]), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_no_interval_claims_too_much(make_pair: Any, kind: str, n_prompts: int, seed: int) -> None:
    pair = degenerate(kind, n_prompts, np.random.default_rng(seed), make_pair)
    finite = np.isfinite(pair.rollout_logprob) & np.isfinite(pair.trainer_logprob)
    d = np.where(finite, pair.trainer_logprob, 0.0) - np.where(finite, pair.rollout_logprob, 0.0)
    one_total = len(np.unique(np.bincount(pair.sequence, weights=d))) == 1
    one_gap = len(np.unique(d[finite])) <= 1
    for key, metric in compute_metrics(pair, replicates=60).items():
        info = CATALOG[key]
        # Ties of the values themselves, exact agreement, and what float64 cannot tell from it.
        alike = key in ("p99_abs_logprob_diff", "frac_outside_clip", "pearson_prob") or metric.value in (0.0, 1.0, -1.0)
        alike |= one_gap if info.level == "token" else one_total
        why = claims_too_much(key, metric, alike, info.bounds)
        assert not why, (key, metric, why)
        if n_prompts < 32 and metric.ci_low is not None and key != "confident_disagreement_rate":
            assert "uncalibrated" in metric.why, (key, metric)


@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_test_is_made_below_16_prompts(make_pair: Any, kind: str, n_prompts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = {name: degenerate(kind, n_prompts, rng, make_pair) for name in ("first", "second")}
    for row in compare_pairs(pairs, PAIRED_KEYS, replicates=40):
        if row.n_prompts < TESTED_PROMPTS:
            assert row.p_value is None
            assert row.differs is None
        if row.ratio.ci_low is None:
            assert row.p_value is None
    n = 10 * n_prompts
    moved = change(
        rng.normal(0, 1, n), rng.normal(0, 1, n), TokenPrompts(np.repeat(np.arange(n_prompts), 10), n_prompts)
    )
    assert (moved.p_value is None) == (n_prompts < TESTED_PROMPTS or moved.rms_ratio.ci_low is None)


def test_4096_prompts_of_one_token(make_pair: Any) -> None:
    rng = np.random.default_rng(0)
    metrics = compute_metrics(make_pair(-rng.exponential(1, 4096), rng.normal(0, 0.02, 4096)), replicates=100)
    for key, metric in metrics.items():
        assert not claims_too_much(key, metric, False, CATALOG[key].bounds), (key, metric)
    assert not metrics["ess_seq"].why  # prompts are many and the ESS is high: nothing to mark


def noise(rng: np.random.Generator, n_prompts: int = 64, each: int = 50) -> np.ndarray:
    return rng.normal(0, 0.03, n_prompts * each)


def test_one_huge_token_withholds_the_interval_and_says_what_is_left(make_pair: Any) -> None:
    """64 prompts × 50 tokens, mean |d| 0.024, one d = −3: once kl_k3 in [5e-5, 9e10], a correlation below −1e50."""
    d = noise(np.random.default_rng(1))
    clean = compute_metrics(make_pair(-1.0 - np.linspace(0, 1, 3200), d, [50] * 64), replicates=300)
    d[700] = -3.0
    metrics = compute_metrics(make_pair(-1.0 - np.linspace(0, 1, 3200), d, [50] * 64), replicates=300)
    for key in ("kl_k3", "rms_logprob_diff", "kl_k2", "pearson_prob"):
        assert clean[key].ci_low is not None
        assert metrics[key].value is not None
        assert metrics[key].ci_low is None, key
        assert "no interval" in metrics[key].why
    # The rest is what the other 63 prompts say.
    assert f"{float(np.sqrt(np.mean(np.delete(d, slice(700, 750)) ** 2))):.3g} [" in metrics["rms_logprob_diff"].why
    assert metrics["mean_abs_logprob_diff"].ci_high is not None


def test_a_spread_over_two_prompts_has_no_interval(make_pair: Any) -> None:
    """Two sequences lie equally far from their mean, so the interval once had no width."""
    metrics = compute_metrics(make_pair(-1.0, [0.1, -0.2]), replicates=50)
    for key in ("seq_log_ratio_std", "ess_seq", "ess_seq_gaussian", "std_prob_diff", "ess_token", "verl_is_std"):
        assert metrics[key].value is not None, key
        assert (metrics[key].ci_low, metrics[key].ci_high) == (None, None), key
        assert "fewer than 3 prompts" in metrics[key].why


def test_two_prompts_of_equal_ratio_are_no_test(make_pair: Any) -> None:
    """Once p = 0 and 2 [2, 2]."""
    first, second = make_pair(-1.0, [0.2, 0.4]), make_pair(-1.0, [0.1, 0.2])
    (row,) = compare_pairs({"first": first, "second": second}, ["mean_abs_logprob_diff"], replicates=50)
    assert row.ratio.value == pytest.approx(2.0)
    assert (row.ratio.ci_low, row.p_value, row.differs) == (None, None, None)


@pytest.mark.parametrize(("centre", "spread"), [(-36.0, 0.45), (-48.0, 2.0), (-1000.0, 0.45), (-60.0, 11.0)])
def test_the_ess_does_not_underflow(make_pair: Any, centre: float, spread: float) -> None:
    """D = −36 ± 0.45 was once an ESS of 1 [1, 1], D = −48 ± 2 "overflows float64"."""
    total = centre + spread * np.random.default_rng(2).standard_normal(64)
    weights = np.exp(total - total.max())
    expected = weights.sum() ** 2 / (64 * (weights**2).sum())
    metric = compute_metrics(make_pair(-1.0, np.repeat(total / 20, 20), [20] * 64), replicates=100)["ess_seq"]
    assert metric.value == pytest.approx(expected, rel=1e-9)
    if metric.ci_low is not None:
        assert metric.ci_low < expected < (metric.ci_high or 0.0)
    if centre > -900:  # a token of −1,000 nats has no log-prob
        metrics = compute_metrics(make_pair(-1.0, total), replicates=100)
        assert metrics["ess_token"].value == pytest.approx(expected, rel=1e-9)
        ratio = float(np.exp(total.max()) * weights.mean())
        assert metrics["mean_ratio"].value == pytest.approx(ratio, rel=1e-9)


def test_a_low_ess_is_marked_by_what_makes_it_low(make_pair: Any) -> None:
    """Var D = 4 at 2,048 prompts: true ESS .018, shown about .05, and no number of prompts was enough of a mark."""
    total = np.random.default_rng(3).normal(-2.0, 2.0, 2048)
    metrics = compute_metrics(make_pair(-1.0, total), replicates=100)
    for key in ("ess_seq", "chi2_seq"):
        assert "optimistic" in metrics[key].why
        assert "exp(−Var log weight) is 0.0" in metrics[key].why
    mild = compute_metrics(make_pair(-1.0, 0.1 * total), replicates=100)
    assert not mild["ess_seq"].why + mild["chi2_seq"].why
    # Sequences that differ in spread: what was not seen yet would lower the ESS.
    mixed = total * np.where(np.arange(2048) % 10, 0.05, 0.25)
    metrics = compute_metrics(make_pair(-1.0, mixed), replicates=100)
    assert "heavy tails" in metrics["ess_seq"].why
    assert "heavy tails" in metrics["chi2_seq"].why


def test_a_quantile_among_ties(make_pair: Any) -> None:
    """One token of 3,200 that is not 0: its 99th percentile is 0 [0, 0]; once 0 [0, 3]."""
    d = np.zeros(3200)
    d[17] = 3.0
    metric = compute_metrics(make_pair(-1.0, d, [50] * 64), replicates=50)["p99_abs_logprob_diff"]
    assert (metric.value, metric.ci_low, metric.ci_high) == (0.0, 0.0, 0.0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_quantile_of_rounded_values_is_covered(seed: int) -> None:
    """On a coarse grid the true quantile is a point of the grid, and lies within the limits nearly always."""
    rng = np.random.default_rng(seed)
    truth, hits = np.round(2.5758, 1), 0
    for _ in range(20):
        values = np.round(np.abs(rng.standard_normal(2000)), 1)
        _, interval = quantile_interval(values, np.arange(100), np.full(100, 20), 0.99)
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    assert hits >= 17


def test_one_prompt_with_most_tokens_is_marked(make_pair: Any) -> None:
    rng = np.random.default_rng(4)
    lengths = [9 * 63 * 10] + [10] * 63
    d = rng.laplace(0, np.repeat(np.exp(rng.normal(0, 0.2, 64)), lengths) * 0.02)
    metric = compute_metrics(make_pair(-1.0, d, lengths), replicates=100)["mean_abs_logprob_diff"]
    assert "unequal prompts" in metric.why or "one prompt has" in metric.why


def exact_rows(
    flips: np.ndarray, times: np.ndarray, kl: np.ndarray, tokens: np.ndarray, prompt: np.ndarray
) -> ExactRows:
    zero = np.zeros(len(flips))
    values = dict.fromkeys(DIVERGENCES, zero) | {"flip": flips, "kl": kl}
    return ExactRows(values, np.ones(len(flips)), times, prompt, tokens, np.ones(len(tokens)))


def test_no_flip_among_few_compared_rows() -> None:
    """512 of 25,600 positions were compared: the limit is that of 512, 7.2e-3, not of 25,600, 1.4e-4."""
    prompt = np.repeat(np.arange(64), 8)
    rows = exact_rows(np.zeros(512), np.full(512, 50.0), np.full(512, 1e-3), np.full(64, 400.0), prompt)
    flips = exact_metrics(rows)["top1_flip_rate"]
    assert isinstance(flips, MetricValue)
    assert (flips.value, flips.ci_low) == (0.0, 0.0)
    assert flips.ci_high == pytest.approx(1 - 0.025 ** (1 / 512), rel=1e-6)


def test_the_exact_kl_knows_that_lengths_vary() -> None:
    """Mean length was taken as known: the interval of the sequence KL held the truth in 78 to 87 %."""
    rng, hits, hits_mean, repeats = np.random.default_rng(5), 0, 0, 200
    for repeat in range(repeats):
        length = rng.integers(20, 400, 64).astype(float)
        scale = 1e-3 * np.exp(rng.normal(-0.08, 0.4, 64))
        prompt = np.repeat(np.arange(64), 8)
        kl = scale[prompt] * rng.exponential(1.0, 512)
        rows = exact_rows(np.zeros(512), np.repeat(length / 8, 8), kl, length, prompt)
        estimates = {key: found for key, found in exact_metrics(rows).items() if isinstance(found, Estimate)}
        values = evaluate(estimates, seed=repeat, replicates=200)
        expected = float((np.bincount(prompt, kl * np.repeat(length / 8, 8))).sum() / 64)
        assert values["kl_seq_exact"].value == pytest.approx(expected, rel=1e-12)
        of_sequence, of_token = values["kl_seq_exact"], values["kl_exact"]
        hits += (of_sequence.ci_low or 9) <= 1e-3 * 209.5 <= (of_sequence.ci_high or 0)
        hits_mean += (of_token.ci_low or 9) <= 1e-3 <= (of_token.ci_high or 0)
    assert 0.92 <= hits / repeats <= 0.99
    assert 0.92 <= hits_mean / repeats <= 0.99
