"""Growth of D with length: prefix sums against brute force, predictions against closed forms and simulated mixtures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.metrics.growth import GrowthDraws
from mismatch_probe.metrics.length import LengthFit, MeasuredLengths, fit_length
from mismatch_probe.metrics.length_prediction import KEYS, crossing_length, forecast, forecast_pair, predict
from mismatch_probe.metrics.sums import LENGTHS, Prefixes, PrefixSums
from mismatch_probe.types import MetricValue, PairArrays
from tests.metrics.strict import assert_strict

Floats = NDArray[np.float64]
NONE = MetricValue(None)


def prefixes(*chunks: PairArrays) -> Prefixes:
    sums = PrefixSums()
    for chunk in chunks:
        sums.update(chunk)
    return sums.result()


def pair_of(d: Floats, prompt: NDArray[np.int64] | None = None) -> PairArrays:
    """Sequences of equal length, d `[S, T]`; by default each with a prompt of its own."""
    s, t = d.shape
    return PairArrays(
        rollout_logprob=np.full(d.size, -1.0),
        trainer_logprob=d.ravel() - 1.0,
        sequence=np.repeat(np.arange(s), t),
        position=np.tile(np.arange(t), s),
        prompt=np.arange(s) if prompt is None else prompt,
    )


def walk(rng: np.random.Generator, s: int, t: int, variance: float, lasting: float = 0.0) -> Floats:
    """Normal D with Var D(t) = variance + lasting, the second part persistent, and E exp D = 1 at every length."""
    rate = np.sqrt(lasting) / t * rng.normal(size=(s, 1))
    drift = variance / t / 2 + lasting / t**2 * (np.arange(1, t + 1) - 0.5)
    return rng.normal(0, np.sqrt(variance / t), (s, t)) + rate - drift


def known(variance: float, *, observed: int = 128, persistence: float = 0.0, scale: tuple[float, ...] = (1.0,)) -> Any:
    """A fit without uncertainty: Σd² = 2 Σk3 = Σexpm1(d)² = variance at the observed length."""
    one = np.ones(2)
    draws = GrowthDraws(
        squares=variance * one,
        k3_share=0.5 * one,
        chi2_share=one,
        trend=one,
        excess=one,
        persistence=persistence * one,
        scale=np.tile(scale, (2, 1)),
        scale_weight=np.full((2, len(scale)), 1 / len(scale)),
        trend_weight=0.0,
        weight=(0.0, 0.0, 1.0),
    )
    none = np.empty(0)
    measured = MeasuredLengths(none.astype(np.int64), none.astype(np.int64), none, none)
    return LengthFit(measured, observed, 64, 64, 0, NONE, NONE, NONE, draws, False, {}, "")


def value(fit: LengthFit, length: int, key: str) -> float:
    found = predict(fit, length).values[key].value
    assert found is not None
    return found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**31), st.data())
@settings(max_examples=40, deadline=None)
def test_prefix_sums_are_those_of_the_tokens(lengths: list[int], seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    d = [rng.laplace(0, 0.5, n) for n in lengths]
    bad = data.draw(st.lists(st.tuples(st.integers(0, len(d) - 1), st.integers(0, 39)), max_size=3))
    for row, place in bad:
        d[row][place % len(d[row])] = np.nan
    flat = np.concatenate(d)
    sequence = np.repeat(np.arange(len(d)), lengths)
    prompt = rng.integers(0, 3, len(d))
    whole = PairArrays(np.zeros(len(flat)), flat, sequence, np.zeros_like(sequence), prompt)
    cut_at = data.draw(st.integers(0, len(d)))
    parts = [
        replace(whole, **{k: getattr(whole, k)[rows] for k in ("rollout_logprob", "trainer_logprob", "sequence")})
        for rows in (sequence < cut_at, sequence >= cut_at)
    ]
    found, streamed = prefixes(whole), prefixes(*parts)
    assert found.n_cut == streamed.n_cut == len({row for row, _ in bad})
    kept = [x[: np.argmax(np.isnan(x))] if np.isnan(x).any() else x for x in d]
    assert found.length.tolist() == [n for n in LENGTHS if n <= max(len(x) for x in kept)]
    for g, length in enumerate(found.length):
        for row, x in enumerate(kept):
            head = x[:length] if len(x) >= length else np.array([np.nan])
            expected = head.sum(), (head**2).sum(), (np.expm1(head) - head).sum(), (np.expm1(head) ** 2).sum()
            for name, want in zip(("log_ratio", "squares", "k3", "chi2"), expected, strict=True):
                got = getattr(found, name)[row, g], getattr(streamed, name)[row, g]
                np.testing.assert_allclose(got, [want] * 2, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found.prompt, prompt)
    np.testing.assert_array_equal(streamed.prompt, prompt)


def test_one_enormous_token_leaves_other_sequences_alone() -> None:
    d = np.full((2, 16), 1e-7)
    d[0, 3] = 1e3
    found = prefixes(pair_of(d))
    assert found.chi2[1] == pytest.approx(found.length * np.expm1((d[1, 0] - 1.0) + 1.0) ** 2, rel=1e-6)
    assert np.isinf(found.chi2[0, -1])


@given(st.floats(1e-8, 5.0), st.floats(0.0, 3.0), st.sampled_from([16, 128, 256, 512, 1024]))
@settings(max_examples=60, deadline=None)
def test_normal_d_has_its_closed_form(variance: float, persistence: float, length: int) -> None:
    fit = known(variance, persistence=persistence)
    share = length / 128
    total = variance * (share + persistence * share**2)
    law = stats.norm(-total / 2, math.sqrt(total))
    assert value(fit, length, "ess_seq") == pytest.approx(math.exp(-total), rel=1e-9)
    assert value(fit, length, "kl_seq") == pytest.approx(total / 2, rel=1e-9)
    assert value(fit, length, "seq_log_ratio_std") == pytest.approx(math.sqrt(total), rel=1e-9)
    for k in (2, 3):
        outside = law.sf(math.log(k)) + law.cdf(-math.log(k))
        assert value(fit, length, f"frac_seq_outside_{k}") == pytest.approx(outside, rel=1e-6, abs=1e-300)


def test_a_share_that_the_data_cannot_show_has_an_open_band() -> None:
    rare = predict(known(0.02), 128).values["frac_seq_outside_3"]  # 64 sequences
    assert rare.value == pytest.approx(0.0, abs=1e-12)
    assert (rare.ci_low, rare.ci_high) == (0.0, 1 / 64)
    impossible = predict(known(1e-8), 128).values["frac_seq_outside_3"]
    assert (impossible.ci_low, impossible.ci_high) == (0.0, pytest.approx(1e-8 / math.log(3) ** 2))
    common = predict(known(0.5), 128).values["frac_seq_outside_2"]
    assert common.ci_low == common.value == common.ci_high


def test_kinds_of_different_scale_are_a_mixture() -> None:
    fit = known(0.5, scale=(0.4, 1.6))
    rng = np.random.default_rng(0)
    v = rng.choice([0.4, 1.6], 2_000_000)  # at twice the observed length Var D is 1 on average
    d = rng.normal(-v / 2, np.sqrt(v))
    w = np.exp(d)
    assert value(fit, 256, "ess_seq") == pytest.approx(w.mean() ** 2 / np.mean(w**2), rel=0.02)
    assert value(fit, 256, "frac_seq_outside_2") == pytest.approx(np.mean(np.abs(d) > math.log(2)), abs=0.002)
    assert value(fit, 256, "kl_seq") == pytest.approx(-d.mean(), abs=0.003)
    assert value(fit, 256, "seq_log_ratio_std") == pytest.approx(d.std(), rel=0.003)


@pytest.mark.parametrize("ess", [0.5, 0.1])
def test_crossing_is_where_the_ess_is_reached(ess: float) -> None:
    assert crossing_length(known(1.0), ess).value == pytest.approx(-128 * math.log(ess), rel=0.01)
    root = (-1 + math.sqrt(1 - 4 * math.log(ess))) / 2  # x + x² = −log ess
    assert crossing_length(known(1.0, persistence=1.0), ess).value == pytest.approx(128 * root, rel=0.01)


def test_a_crossing_beyond_the_reach_says_so_and_what_would_settle_it() -> None:
    found = crossing_length(known(0.01), 0.5)
    assert (found.value, found.ci_low, found.ci_high) == (None, None, None)
    assert found.why == (
        "it lies beyond 1,024 tokens; 16,384 tokens would settle it (64 prompts with responses of 256)"
    )
    assert crossing_length(known(0.01), 0.5, extrapolate=True).value == pytest.approx(12_800 * math.log(2), rel=0.01)


def test_beyond_eight_times_it_declines_unless_told() -> None:
    fit = known(0.1)
    assert predict(fit, 1024).tokens_needed == 0
    declined = predict(fit, 1025)
    assert all(declined.values[key].value is None for key in KEYS)
    assert declined.tokens_needed == 64 * 129
    assert "8,256 tokens would settle it (64 prompts with responses of 129)" in declined.values["ess_seq"].why
    told = predict(fit, 1025, extrapolate=True)
    assert told.values["ess_seq"].value == pytest.approx(math.exp(-0.1 * 1025 / 128))
    assert "extrapolated" in told.values["ess_seq"].why
    assert told.tokens_needed == declined.tokens_needed


def test_off_policy_pairs_are_not_predicted() -> None:
    d = walk(np.random.default_rng(0), 40, 64, 0.1)
    pair = replace(pair_of(d), on_policy=False, off_policy_why="temperature 0.7")
    found = forecast_pair([pair], lengths=[128])
    assert found.fit.why == "temperature 0.7"
    assert found.fit.observed_length == 0
    assert found.predictions[0].values["ess_seq"] == MetricValue(None, why="temperature 0.7")
    assert found.crossings[0.5] == MetricValue(None, why="temperature 0.7")
    assert found.curve == ()
    assert_strict(found)


def test_identical_policies_are_predicted_exactly() -> None:
    found = forecast_pair([pair_of(np.zeros((40, 64)))])
    assert [p.length for p in found.predictions] == [128, 256, 512]
    assert found.predictions[0].values["ess_seq"] == MetricValue(1.0, 1.0, 1.0)
    assert found.predictions[0].values["kl_seq"] == MetricValue(0.0, 0.0, 0.0)
    assert found.crossings[0.5].why == "never: D is 0 everywhere"
    assert_strict(found)


@pytest.mark.parametrize(
    ("d", "why"),
    [
        (np.zeros((7, 64)), "fewer than 8 prompts"),
        (np.zeros((40, 7)), "a response of 8 tokens or more"),
        (np.full((40, 64), -0.1), "D does not vary"),
        (np.full((40, 64), 400.0), "overflows float64"),
    ],
)
def test_what_cannot_be_fitted_says_why(d: Floats, why: str) -> None:
    found = forecast_pair([pair_of(d)], lengths=[128])
    assert why in found.fit.why
    assert why in found.predictions[0].values["ess_seq"].why
    assert_strict(found)


def test_a_drift_that_no_sampling_law_has_is_named() -> None:
    d = walk(np.random.default_rng(0), 40, 64, 0.1)
    assert fit_length(prefixes(pair_of(d))).why == ""
    for bias in (0.02, -0.02):
        assert "exp(b) is not the sampling distribution" in fit_length(prefixes(pair_of(d + bias))).why


@pytest.mark.parametrize("bias", [1e-5, -1e-5])
def test_a_drift_as_float32_log_softmax_makes_it_is_named_as_such(bias: float) -> None:
    """An FP32 pair on a CPU: far beyond what its variance explains, and no fault of the sampling law."""
    d = bias + np.random.default_rng(0).normal(0, 1e-6, (40, 64))
    why = fit_length(prefixes(pair_of(d))).why
    assert why == "D drifts by at most 1.0e-05 nats a token, the known bias of float32 log-softmax"


def test_nothing_at_all() -> None:
    found = forecast(fit_length(prefixes()))
    assert found.predictions == ()
    assert "fewer than 8 prompts" in found.fit.why


def test_the_observed_length_is_what_enough_prompts_reach() -> None:
    rng = np.random.default_rng(0)
    long, short = walk(rng, 20, 256, 0.1), walk(rng, 20, 64, 0.1)
    both = pair_of(long), replace(pair_of(short), prompt=np.arange(20, 40))
    fit = fit_length(prefixes(*both))
    assert (fit.observed_length, fit.n_prompts, fit.n_sequences) == (256, 20, 20)
    assert "fewer than 32 prompts" in fit.why
    few = fit_length(prefixes(pair_of(long[:19]), both[1]))
    assert (few.observed_length, few.n_prompts) == (64, 39)
    assert few.why == ""


def test_random_walk_and_persistence_are_told_apart() -> None:
    rng = np.random.default_rng(3)
    free = fit_length(prefixes(pair_of(walk(rng, 64, 256, 0.2))))
    bound = fit_length(prefixes(pair_of(walk(rng, 64, 256, 0.002, 0.198))))
    for fit, exponent in ((free, 1.0), (bound, 2.0)):
        gamma = fit.variance_exponent
        assert gamma.ci_low is not None
        assert gamma.ci_high is not None
        assert gamma.ci_low < exponent < gamma.ci_high
        assert gamma.ci_high - gamma.ci_low < 0.7
    assert free.draws is not None
    assert bound.draws is not None
    assert free.draws.weight[0] > 0.3
    assert bound.draws.weight[2] > 0.99


@pytest.mark.parametrize(("variance", "lasting"), [(0.2, 0.0), (0.02, 0.18)])
def test_bands_cover_the_truth(variance: float, lasting: float) -> None:
    """40 runs of 48 prompts; at a nominal 95 % fewer than 32 hits would have a probability below 1e-3."""
    hits = dict.fromkeys(KEYS, 0)
    for seed in range(40):
        fit = fit_length(prefixes(pair_of(walk(np.random.default_rng(seed), 48, 64, variance, lasting))), seed=seed)
        total = variance * 4 + lasting * 16
        law = stats.norm(-total / 2, math.sqrt(total))
        truth = (math.exp(-total), *(law.sf(math.log(k)) + law.cdf(-math.log(k)) for k in (2, 3)), total / 2)
        for key, true in zip(KEYS, (*truth, math.sqrt(total)), strict=True):
            band = predict(fit, 256).values[key]
            if band.ci_low is not None and band.ci_high is not None:  # about 1 in 100 is withheld by chance
                hits[key] += band.ci_low <= true <= band.ci_high
    assert min(hits.values()) >= 32, hits


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_longer_is_worse_and_order_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = walk(rng, 36, 64, 0.3 * rng.random() + 1e-9, 0.3 * rng.random())
    found = forecast_pair([pair_of(d, np.arange(36) // 2)])
    for key in KEYS:
        bands = [p.values[key] for p in found.curve]
        curve = np.array([(b.ci_low, b.value, b.ci_high) for b in bands], dtype=np.float64)
        assert (np.diff(curve, axis=1) >= 0).all()
        if "outside" not in key:
            sign = -1 if key == "ess_seq" else 1
            assert (sign * np.diff(curve, axis=0) >= -1e-12).all()
    order = rng.permutation(2) + 2 * np.arange(18)[:, None]
    swapped = forecast_pair([pair_of(d[order.ravel()], np.arange(36) // 2)])
    for a, b in zip(found.predictions, swapped.predictions, strict=True):
        for key in KEYS:
            assert a.values[key].value == pytest.approx(b.values[key].value, rel=1e-3)
    assert_strict(found)


def test_growth_has_no_scale() -> None:
    d = walk(np.random.default_rng(1), 40, 64, 1e-4)
    large, small = (fit_length(prefixes(pair_of(x))) for x in (d, d * 1e-5))
    for a, b in ((large.variance_exponent, small.variance_exponent), (large.variance_ratio, small.variance_ratio)):
        assert (a.value, a.ci_low, a.ci_high) == pytest.approx((b.value, b.ci_low, b.ci_high), rel=1e-3)
