"""Mismatches with known answers, planted between real vLLM and the real trainer: the instrument must read them.

Both engines run in FP32, so that what was not planted is a million times smaller. vLLM starts three times in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mismatch_probe.rl.stress import round_mantissa
from tests.real.planted import (
    MAX_TOKENS,
    PROMPTS,
    Floats,
    Measured,
    Sampled,
    Truth,
    Weights,
    change_weights,
    decode,
    float64_rows,
    measure,
    sample,
)
from tests.real.tiny import VOCABULARY

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]

TEMPERATURE = 1.25
BIAS = 0.4 * np.random.default_rng(3).standard_normal(VOCABULARY).astype(np.float32)
MASKED = slice(96, VOCABULARY)
# What FP32 forwards of this model differ by: d itself, and a divergence of planted size by its share.
FLOOR, SHARE = 5e-5, 1e-5
# Tool's key and the expectation that its interval must hold.
SAMPLED = {
    "mean_abs_logprob_diff": "mean_abs",
    "kl_k1": "kl",
    "kl_k2": "k2",
    "kl_k3": "kl",
    "chi2_token": "chi2",
    "mean_ratio": "mean_ratio",
}
EXACT = {"kl_exact": "kl", "kl_exact_reverse": "kl_reverse", "tv_exact": "tv", "chi2_exact": "chi2"}


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    """Samples of a model whose head has a bias, made about as sure as a trained one (1.7 nats of entropy)."""
    folder = tmp_path_factory.mktemp("base")

    def sharpen(weights: Weights) -> None:
        weights["lm_head.weight"] *= 3.0

    return sample(change_weights(tiny("gptj"), folder / "model", sharpen), folder)


@pytest.fixture(scope="module")
def log_mu(base: Sampled) -> Floats:
    return float64_rows(base.checkpoint, base.sequences)


@pytest.fixture(scope="module")
def masked(base: Sampled, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    """Samples of the same model that cannot say a slice of the vocabulary."""
    folder = tmp_path_factory.mktemp("masked")

    def mask(weights: Weights) -> None:
        weights["lm_head.bias"][MASKED] -= 1e4

    return sample(change_weights(base.checkpoint, folder / "model", mask), folder)


def heat(weights: Weights, temperature: float) -> None:
    weights["lm_head.weight"] /= temperature
    weights["lm_head.bias"] /= temperature


def bend(weights: Weights, bias: Floats) -> None:
    weights["lm_head.bias"] += torch.from_numpy(bias)


def shake(weights: Weights, sigma: float) -> None:
    draw = torch.Generator().manual_seed(5)
    for values in weights.values():
        values *= 1 + sigma * torch.randn(values.shape, generator=draw)


def planted(base: Sampled, folder: Path, change: Callable[[Weights], None]) -> Measured:
    return measure(base, change_weights(base.checkpoint, folder / "trainer", change))


def assert_reads(found: Measured, truth: Truth, share: float = SHARE) -> None:
    """Every token, every exact divergence to the FP32 floor, and every sampled metric within its interval."""
    np.testing.assert_allclose(found.log_ratio, truth.log_ratio, atol=FLOOR)
    for key, name in EXACT.items():
        assert found.value(key) == pytest.approx(getattr(truth, name), rel=share), key
    # The standard error of a sketch is 6 %.
    assert found.value("score_drift") == pytest.approx(truth.drift, rel=0.2)
    for key, name in SAMPLED.items():
        metric = found.metrics[key]
        assert metric.ci_low is not None, key
        assert metric.ci_high is not None, key
        assert metric.ci_low <= getattr(truth, name) <= metric.ci_high, key


@pytest.fixture(scope="module")
def heated(base: Sampled, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return planted(base, tmp_path_factory.mktemp("heated"), partial(heat, temperature=TEMPERATURE))


def test_the_sample_is_what_the_checks_need(base: Sampled, log_mu: Floats) -> None:
    entropy = -(np.exp(log_mu) * log_mu).sum(1).mean()
    assert 1 < entropy < 4
    assert len(base.tokens) > 1000
    np.testing.assert_allclose(base.logprobs, log_mu[np.arange(len(log_mu)), base.tokens], atol=FLOOR)


def test_a_temperature_is_read(base: Sampled, log_mu: Floats, heated: Measured) -> None:
    assert_reads(heated, Truth.of_tilt(log_mu, (1 / TEMPERATURE - 1) * log_mu, base.tokens))


def test_another_temperature_is_told_apart(base: Sampled, log_mu: Floats, heated: Measured) -> None:
    other = Truth.of_tilt(log_mu, (1 / (TEMPERATURE + 0.001) - 1) * log_mu, base.tokens)
    for key, name in EXACT.items():
        assert heated.value(key) != pytest.approx(getattr(other, name), rel=SHARE), key
    coarse = Truth.of_tilt(log_mu, (1 / (TEMPERATURE + 0.1) - 1) * log_mu, base.tokens)
    for key in ("mean_abs_logprob_diff", "kl_k2", "kl_k3"):
        high = heated.metrics[key].ci_high
        assert high is not None
        assert high < getattr(coarse, SAMPLED[key]), key


def test_a_bias_of_the_logits_is_read(base: Sampled, log_mu: Floats, tmp_path: Path) -> None:
    found = planted(base, tmp_path, partial(bend, bias=BIAS))
    assert_reads(found, Truth.of_tilt(log_mu, BIAS.astype(np.float64), base.tokens))


@pytest.mark.parametrize("sigma", [1e-3, 1e-2])
def test_noise_in_the_weights_is_read(base: Sampled, log_mu: Floats, tmp_path: Path, sigma: float) -> None:
    found = planted(base, tmp_path, partial(shake, sigma=sigma))
    log_pi = float64_rows(tmp_path / "trainer", base.sequences)
    # Any pair of laws is a tilt by the difference of its log-probs.
    truth = Truth.of_tilt(log_mu, log_pi - log_mu, base.tokens)
    assert_reads(found, truth, share=1e-4)
    d = truth.log_ratio
    assert found.value("mean_abs_logprob_diff") == pytest.approx(np.abs(d).mean(), rel=1e-3)
    assert found.value("kl_k2") == pytest.approx(0.5 * (d**2).mean(), rel=1e-3)
    assert found.value("kl_k3") == pytest.approx((np.expm1(d) - d).mean(), rel=1e-3)
    assert np.abs(d).mean() > 5 * sigma


def test_noise_ten_times_larger_is_a_hundred_times_the_divergence(base: Sampled, tmp_path: Path) -> None:
    kl = [planted(base, tmp_path / str(sigma), partial(shake, sigma=sigma)).value("kl_exact") for sigma in (1e-4, 1e-3)]
    assert kl[1] / kl[0] == pytest.approx(100, rel=0.05)


def test_rounded_activations_are_read(base: Sampled, log_mu: Floats) -> None:
    hook = partial(round_mantissa, bits=5)
    found = measure(base, base.checkpoint, hook)
    log_pi = float64_rows(base.checkpoint, base.sequences, hook)
    truth = Truth.of_tilt(log_mu, log_pi - log_mu, base.tokens)
    # Rounding is not continuous: where FP32 and float64 stand on two sides of a tie, a bit of one activation differs.
    assert np.median(np.abs(found.log_ratio - truth.log_ratio)) < FLOOR
    assert found.value("mean_abs_logprob_diff") == pytest.approx(np.abs(truth.log_ratio).mean(), rel=0.01)
    for key, name in EXACT.items():
        assert found.value(key) == pytest.approx(getattr(truth, name), rel=5e-3), key


def test_a_mask_on_the_rollout_side_is_read(base: Sampled, masked: Sampled) -> None:
    found = measure(masked, base.checkpoint)
    log_pi = float64_rows(base.checkpoint, masked.sequences)
    kept = 1 - np.exp(log_pi)[:, MASKED].sum(1)
    assert (masked.tokens < MASKED.start).all()
    assert 0.05 < 1 - kept.mean() < 0.95
    # μ is π without the slice, so d = log of the kept mass whichever token came, and E[ρ] is its mean, not 1.
    np.testing.assert_allclose(found.log_ratio, np.log(kept), atol=FLOOR)
    assert found.value("mean_ratio") == pytest.approx(kept.mean(), rel=SHARE)
    high = found.metrics["mean_ratio"].ci_high
    assert high is not None
    assert high < 1
    assert found.value("kl_k1") == pytest.approx(-np.log(kept).mean(), rel=SHARE)
    assert found.value("chi2_token") == pytest.approx((kept**2).mean() - 1, rel=SHARE)
    assert found.value("kl_exact") == pytest.approx(-np.log(kept).mean(), rel=SHARE)
    assert found.value("tv_exact") == pytest.approx(1 - kept.mean(), rel=SHARE)
    # Tokens that only the trainer can say have logits of −1e4 here, which is next to impossible and not excluded: the
    # other direction costs 1e4 nats for each, and χ² is beyond what float64 holds.
    assert found.value("kl_exact_reverse") == pytest.approx(1e4 * (1 - kept.mean()), rel=0.01)
    assert found.metrics["chi2_exact"].value is None
    assert "finite at none of" in found.metrics["chi2_exact"].why


def test_decoding_again_gives_the_same_tokens_and_the_same_bits(base: Sampled, tmp_path: Path) -> None:
    forced = [
        replace(request, seed=0, forced_token_ids=rollout.response_token_ids)
        for request, rollout in zip(base.requests, base.rollouts, strict=True)
    ]
    found = decode(base.checkpoint, forced, tmp_path / "vllm.log", self_noise_tokens=MAX_TOKENS)
    assert len(found.rollouts) == len(found.self_noise_rollouts) == PROMPTS
    for sampled, replayed, repeated in zip(base.rollouts, found.rollouts, found.self_noise_rollouts, strict=True):
        assert sampled.sequence_id == replayed.sequence_id == repeated.sequence_id
        np.testing.assert_array_equal(replayed.response_token_ids, sampled.response_token_ids)
        np.testing.assert_array_equal(repeated.logprobs, replayed.logprobs)
        np.testing.assert_array_equal(replayed.logprobs, sampled.logprobs)
