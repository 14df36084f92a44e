"""The arithmetic of the benchmark that counts mantissa bits; it needs torch but starts no engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mismatch_probe.types import MetricValue, PairArrays
from validation.mantissa_bits import BITS, METRICS, bits_figure, filled, fit

FORMATS = [(7, torch.bfloat16), (10, torch.float16)]


def draw(count: int = 10_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def synthetic(halving: float, scale: float = 0.1) -> dict[int, PairArrays]:
    """Pairs whose d is the same noise, divided by 2^halving with every bit."""
    rng = np.random.default_rng(0)
    prompts, tokens = 64, 20
    n = prompts * tokens
    rollout, noise = -rng.exponential(1.0, n), scale * rng.standard_normal(n)
    sequence = np.repeat(np.arange(prompts), tokens)
    position = np.tile(np.arange(tokens), prompts)
    return {
        bits: PairArrays(rollout, rollout + noise * 2.0 ** (-halving * bits), sequence, position, np.arange(prompts))
        for bits in BITS
    }


@pytest.mark.parametrize(("bits", "dtype"), FORMATS)
def test_filled_weights_are_new_and_round_back(bits: int, dtype: torch.dtype) -> None:
    stored = draw()[draw().abs() > 2.0**-14].to(dtype).float()
    wide = filled(stored, bits, torch.Generator().manual_seed(1))
    # Just below a power of two numbers lie twice as dense, so there a quarter of the values goes to a neighbour.
    power = torch.frexp(stored)[0].abs() == 0.5
    assert torch.equal(wide.to(dtype).float()[~power], stored[~power])
    assert (wide != stored).float().mean() > 0.99
    assert not filled(torch.zeros(4), bits, torch.Generator()).any()


def test_the_slope_is_the_one_that_was_planted() -> None:
    for halving in (1.0, 0.7):
        pairs = synthetic(halving)
        found = fit(pairs, "mean_abs_logprob_diff", 1)
        assert found.slope.value == pytest.approx(-halving)
        d = {bits: pair.trainer_logprob - pair.rollout_logprob for bits, pair in pairs.items()}
        assert found.intercept + 6 * found.slope.value == pytest.approx(np.log2(np.abs(d[6]).mean()))
        squared = fit(pairs, "kl_k3", 4)
        assert squared.slope.value == pytest.approx(-2 * halving, rel=1e-2)
        level = np.mean([np.log2((np.expm1(d[bits]) - d[bits]).mean()) for bits in range(4, 11)])
        assert squared.intercept + 7 * squared.slope.value == pytest.approx(level)


def test_the_figure_shows_every_point_and_names_the_slope() -> None:
    keys = [key for key, *_ in METRICS]
    points = {key: {bits: MetricValue(2.0**-bits, 0.9 * 2.0**-bits, 1.1 * 2.0**-bits) for bits in BITS} for key in keys}
    formats = {key: {dtype: MetricValue(0.1, 0.08, 0.12) for dtype in ("bfloat16", "float16")} for key in keys}
    pairs = synthetic(1.0, scale=1e-3)
    figure = bits_figure(points, formats, dict.fromkeys(keys, 1e-6), {key: fit(pairs, key, 4) for key in keys})
    for axes, (*_, power) in zip(figure.axes, METRICS, strict=True):
        drawn = axes.containers[0].lines[0]
        np.testing.assert_array_equal(drawn.get_xdata(), BITS)
        np.testing.assert_allclose(drawn.get_ydata(), [2.0**-bits for bits in BITS])
        entries = " | ".join(entry.get_text() for entry in axes.get_legend().get_texts())
        slope = f"fit from k = 4: slope −{-power}.00 [−{-power}.00, −{-power}.00] per bit"
        for part in (slope, "bfloat16", "float16", "FP32 on both sides"):
            assert part in entries
