"""Properties that hold for any pair, searched by hypothesis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import MetricValue, PairArrays

Spec = tuple[list[int], list[float], list[float], list[int]]


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Lengths, b, d and prompts; d from FP32-sized gaps to a broken engine's."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    n, scale = sum(lengths), 10.0 ** draw(st.integers(-12, 1))
    b = draw(st.lists(st.floats(-30, 0), min_size=n, max_size=n))
    d = draw(st.lists(st.floats(-1, 1).map(lambda x: x * scale), min_size=n, max_size=n))
    prompts = sorted(draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths))))
    return lengths, b, d, list(np.unique(prompts, return_inverse=True)[1])


def compute(pair: PairArrays) -> dict[str, MetricValue]:
    return compute_metrics(pair, replicates=25)


def same(first: MetricValue, second: MetricValue, *, scale: float = 1.0) -> bool:
    if first.value is None or second.value is None:
        return first.value is second.value
    return first.value == pytest.approx(second.value, rel=1e-6, abs=1e-12 * scale)


@given(specs())
@settings(max_examples=60, deadline=None)
def test_ranges_and_intervals(make_pair: Any, spec: Spec) -> None:
    lengths, b, d, prompts = spec
    metrics = compute(make_pair(b, d, lengths, prompts))
    for key, metric in metrics.items():
        numbers = [x for x in (metric.value, metric.ci_low, metric.ci_high) if x is not None]
        assert all(math.isfinite(x) for x in numbers), key
        assert metric.value is not None or metric.why, key
        if CATALOG[key].positive:
            assert all(x >= 0 for x in numbers), key
        if metric.ci_low is not None and metric.ci_high is not None:
            assert metric.ci_low <= (metric.value or 0.0) <= metric.ci_high, key
    for key in ("ess_token", "ess_seq", "ess_seq_gaussian", "ess_seq_truncated", "verl_ess", "frac_outside_clip"):
        assert all(0 <= x <= 1 for x in (metrics[key].value, metrics[key].ci_high) if x is not None), key
    for key in ("token_mult_prob_error", "seq_mult_prob_error_max"):
        assert (metrics[key].value or 1) >= 1, key
    for key in ("chi2_token", "chi2_seq", "pearson_prob"):
        assert (metrics[key].value or 0) >= -1 - 1e-12, key


@given(specs())
@settings(max_examples=40, deadline=None)
def test_a_policy_compared_with_itself(make_pair: Any, spec: Spec) -> None:
    lengths, b, _, prompts = spec
    metrics = compute(make_pair(b, np.zeros(len(b)), lengths, prompts))
    for key in ("kl_k1", "kl_k2", "kl_k3", "js_k3", "kl_seq", "chi2_token", "chi2_seq", "mean_abs_prob_diff"):
        assert metrics[key].value == 0.0, key
    for key in ("mean_ratio", "ess_token", "ess_seq", "ess_seq_truncated", "verl_is_mean", "verl_ess", "ppl_ratio"):
        assert metrics[key].value == 1.0, key


@given(specs(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_of_sequences_is_irrelevant(make_pair: Any, spec: Spec, random: Any) -> None:
    lengths, b, d, prompts = spec
    order = list(range(len(lengths)))
    random.shuffle(order)
    ends = np.cumsum(lengths)
    rows = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in order])
    first = compute(make_pair(b, d, lengths, prompts))
    shuffled = make_pair(np.array(b)[rows], np.array(d)[rows], [lengths[i] for i in order], [prompts[i] for i in order])
    second = compute(shuffled)
    scale = max(map(abs, d))
    for key in CATALOG:
        if key not in ("seq_log_ratio_slope_per_1k", "seq_log_ratio_intercept"):
            assert same(first[key], second[key], scale=max(scale, 1e-3)), key


@given(specs())
@settings(max_examples=40, deadline=None)
def test_swapping_sides(make_pair: Any, spec: Spec) -> None:
    """What is even in d stays, what is odd changes its sign."""
    lengths, b, d, prompts = spec
    pair = make_pair(b, d, lengths, prompts)
    swapped = PairArrays(
        pair.trainer_logprob, pair.rollout_logprob, pair.sequence, pair.position, pair.prompt, pair.prompt_ids
    )
    there, back = compute(pair), compute(swapped)
    even = ["mean_abs_logprob_diff", "rms_logprob_diff", "p99_abs_logprob_diff", "max_abs_logprob_diff", "kl_k2"]
    even += ["mean_abs_prob_diff", "std_prob_diff", "max_abs_prob_diff", "js_k3", "token_mult_prob_error"]
    even += ["seq_log_ratio_std", "ess_seq_gaussian", "seq_mult_prob_error_max", "pearson_prob"]
    for key in even:
        assert same(there[key], back[key]), key
    for key in ("kl_k1", "seq_log_ratio_mean", "kl_seq", "seq_log_ratio_rate_per_1k", "log_ppl_diff"):
        assert back[key].value == pytest.approx(-(there[key].value or 0.0), rel=1e-9, abs=1e-12), key
    assert back["seq_log_ratio_min"].value == pytest.approx(-(there["seq_log_ratio_max"].value or 0.0), abs=1e-12)


@given(specs())
@settings(max_examples=25, deadline=None)
def test_means_of_a_pair_and_its_copy_are_those_of_the_pair(make_pair: Any, spec: Spec) -> None:
    lengths, b, d, prompts = spec
    once = compute(make_pair(b, d, lengths, prompts))
    twice = compute(make_pair(b * 2, d * 2, lengths * 2, prompts + [p + max(prompts) + 1 for p in prompts]))
    corrected = {"std_prob_diff", "seq_log_ratio_std", "ess_seq_gaussian"}  # n − 1
    counts = {"confident_disagreement_count", "p99_abs_logprob_diff"}
    counts |= {key for key in CATALOG if key.startswith("winsorised") or key.endswith(("_p10", "_p50", "_p90"))}
    for key in CATALOG:
        if key not in corrected | counts | {"seq_log_ratio_slope_per_1k", "seq_log_ratio_intercept"}:
            assert same(once[key], twice[key]), key
