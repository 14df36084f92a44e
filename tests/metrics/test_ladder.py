"""Contributions of rungs and changes of a gap: sums, closed forms, and the bootstrap's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mismatch_probe.metrics.ladder import (
    CLOSED,
    NO_GAP,
    UNCHANGED,
    TokenPrompts,
    change,
    climb,
    contribution_of,
    gap,
)

PROMPTS, EACH = 40, 25


def tokens_of(n_prompts: int = PROMPTS, each: int = EACH) -> TokenPrompts:
    return TokenPrompts(np.repeat(np.arange(n_prompts), each), n_prompts)


def passes_of(seed: int, scales: list[float], bias: float = 0.0) -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    found = [-rng.exponential(2.0, PROMPTS * EACH)]
    for scale in scales:
        found.append(found[-1] + bias + scale * rng.standard_normal(PROMPTS * EACH))
    return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scales=st.lists(st.floats(1e-6, 10), min_size=1, max_size=5), bias=st.floats(-1, 1))
def test_contributions_add_up_to_one_and_rungs_to_the_gap(seed: int, scales: list[float], bias: float) -> None:
    passes = passes_of(seed, scales, bias)
    rungs = climb(passes, tokens_of(), replicates=50)
    assert sum(rung.contribution.value or 0.0 for rung in rungs) == pytest.approx(1, abs=1e-9)
    assert sum(rung.mean.value or 0.0 for rung in rungs) == pytest.approx(np.mean(passes[-1] - passes[0]), abs=1e-9)


def test_a_contribution_is_what_its_formula_says() -> None:
    first, second, third = passes_of(0, [0.3, 0.1])
    rungs = climb([first, second, third], tokens_of())
    d = third - first
    assert rungs[0].contribution.value == pytest.approx(np.sum((second - first) * d) / np.sum(d**2), rel=1e-12)
    assert rungs[1].rms.value == pytest.approx(np.sqrt(np.mean((third - second) ** 2)), rel=1e-12)


def test_independent_rungs_contribute_by_their_variances_within_the_intervals() -> None:
    rungs = climb(passes_of(1, [0.3, 0.4]), tokens_of())
    for rung, expected in zip(rungs, (0.09 / 0.25, 0.16 / 0.25), strict=True):
        assert rung.contribution.ci_low is not None
        assert rung.contribution.ci_high is not None
        assert rung.contribution.ci_low < expected < rung.contribution.ci_high


def test_a_bias_counts() -> None:
    start = np.zeros(PROMPTS * EACH)
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(start))
    rungs = climb([start, start + noise, start + noise + 0.1], tokens_of())
    assert rungs[1].contribution.value == pytest.approx(1, abs=0.05)


def test_a_rung_that_undoes_another_has_a_negative_contribution() -> None:
    start, noise = np.zeros(PROMPTS * EACH), np.random.default_rng(0).standard_normal((2, PROMPTS * EACH))
    rungs = climb([start, start + noise[0], start + 0.1 * noise[1] + 0.5 * noise[0]], tokens_of())
    assert rungs[0].contribution.value > 1
    assert rungs[1].contribution.value < 0


def test_a_rung_without_any_change_is_exactly_zero_and_says_so() -> None:
    first, last = passes_of(0, [0.1])
    rungs = climb([first, first, last], tokens_of())
    assert (rungs[0].contribution.value, rungs[0].contribution.why) == (0.0, UNCHANGED)
    assert rungs[1].contribution.value == pytest.approx(1)
    # One rung makes all of every prompt's gap: nothing varies, and the interval says as much.
    assert rungs[1].contribution.ci_low == pytest.approx(1)
    assert rungs[1].contribution.ci_high == pytest.approx(1)


def test_without_a_gap_there_are_no_contributions() -> None:
    first = passes_of(0, [])[0]
    other = first + 0.1
    rungs = climb([first, other, first], tokens_of())
    assert rungs[0].contribution.value is None
    assert rungs[0].contribution.why == NO_GAP
    assert rungs[0].rms.value == pytest.approx(0.1)


def test_tokens_that_are_not_finite_in_one_pass_are_left_out_of_all() -> None:
    passes = passes_of(0, [0.1, 0.1])
    passes[1][::7] = np.nan
    kept = np.isfinite(passes[1])
    rungs = climb(passes, tokens_of())
    assert rungs[1].rms.value == pytest.approx(np.sqrt(np.mean((passes[2] - passes[1])[kept] ** 2)))
    assert climb([np.full(4, np.nan)] * 2, tokens_of(2, 2))[0].rms.value is None


def test_a_change_is_paired_by_prompt() -> None:
    rng = np.random.default_rng(3)
    # Prompts differ a hundredfold, but the change halves every one of them.
    before = np.repeat(10 ** rng.uniform(-2, 0, PROMPTS), EACH) * rng.standard_normal(PROMPTS * EACH)
    found = change(before, before / 2, tokens_of())
    ratio = found.rms_ratio
    assert ratio.value == pytest.approx(0.5, rel=1e-12)
    assert ratio.ci_low == pytest.approx(0.5, rel=1e-6)
    assert ratio.ci_high == pytest.approx(0.5, rel=1e-6)
    assert found.shift.value == pytest.approx(np.sqrt(np.mean(before**2)) / 2)
    assert found.k3_ratio.value == pytest.approx(
        np.mean(np.expm1(before / 2) - before / 2) / np.mean(np.expm1(before) - before)
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-9, 1))
def test_a_change_to_itself_changes_nothing(seed: int, scale: float) -> None:
    d = scale * np.random.default_rng(seed).standard_normal(PROMPTS * EACH)
    found = change(d, d.copy(), tokens_of(), replicates=50)
    assert (found.rms_ratio.value, found.shift.value, found.shift.why) == (1.0, 0.0, UNCHANGED)


def test_an_interval_holds_a_ratio_that_is_one() -> None:
    rng = np.random.default_rng(4)
    before, after = rng.standard_normal((2, PROMPTS * EACH))
    ratio = change(before, after, tokens_of()).rms_ratio
    assert ratio.ci_low is not None
    assert ratio.ci_high is not None
    assert ratio.ci_low < 1 < ratio.ci_high


def test_a_change_that_breaks_tokens_has_no_ratio() -> None:
    before = np.ones(50)
    after = 0.1 * before
    after[:5] = np.nan
    found = change(before, after, tokens_of(2, 25))
    values = (found.rms, found.k3, found.rms_ratio, found.k3_ratio, found.shift)
    assert all(value.value is None for value in values)
    assert found.p_value is None
    assert found.rms_ratio.why == "the change makes 5 tokens not finite"
    # What was broken before is nothing that the change does.
    assert change(np.where(np.isnan(after), np.nan, before), after, tokens_of(2, 25)).rms_ratio.value is not None


def test_a_gap_of_nothing() -> None:
    assert gap(np.zeros(50), tokens_of(2, 25)).rms.value == 0
    assert change(np.zeros(50), np.zeros(50), tokens_of(2, 25)).rms_ratio.value is None
    one = change(np.zeros(50), np.ones(50), tokens_of(2, 25))
    assert one.rms_ratio.value is None
    assert one.rms.value == pytest.approx(1)


def test_contributions_of_some_tokens() -> None:
    d = np.ones(PROMPTS * EACH)
    chosen = np.arange(len(d)) % 4 == 0
    d[chosen] = 3.0
    assert contribution_of(d, chosen, tokens_of()).value == pytest.approx(9 / (9 + 3), rel=0.01)
    assert contribution_of(d, np.zeros_like(chosen), tokens_of()).value == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), shrink=st.floats(0.9, 1.1))
def test_a_p_value_says_what_its_interval_says(seed: int, shrink: float) -> None:
    before, noise = np.random.default_rng(seed).standard_normal((2, PROMPTS * EACH))
    found = change(before, shrink * before + 0.3 * noise, tokens_of(), replicates=100)
    assert found.p_value is not None
    assert found.rms_ratio.ci_low is not None
    assert found.rms_ratio.ci_high is not None
    assert (found.p_value < 0.05) == (not found.rms_ratio.ci_low <= 1 <= found.rms_ratio.ci_high)


def test_a_change_that_leaves_no_gap() -> None:
    found = change(np.ones(1000), np.zeros(1000), tokens_of())
    ratio = found.rms_ratio
    assert (ratio.value, ratio.ci_low, ratio.ci_high, ratio.why) == (0.0, 0.0, 0.0, CLOSED)
    assert (found.k3_ratio.value, found.p_value, found.shift.value) == (0.0, 2.0**-39, 1.0)
    few = change(np.ones(50), np.zeros(50), tokens_of(2, 25))  # as two heads of two coins
    assert (few.rms_ratio.value, few.rms_ratio.ci_low, few.p_value) == (0.0, None, None)
    alone = change(np.ones(50), np.zeros(50), tokens_of(1, 50))
    assert (alone.rms_ratio.value, alone.rms_ratio.ci_low, alone.p_value) == (0.0, None, None)


def test_a_gap_of_one_prompt_has_no_spread() -> None:
    before = np.zeros(PROMPTS * EACH)
    before[:EACH] = np.random.default_rng(0).standard_normal(EACH)
    found = change(before, before / 2, tokens_of())
    assert found.rms_ratio.value == pytest.approx(0.5)
    assert (found.rms_ratio.ci_low, found.k3_ratio.ci_low, found.p_value) == (None, None, None)
    assert "one prompt" in found.rms_ratio.why


def test_what_has_no_interval_has_no_p_value() -> None:
    assert change(np.ones(50), np.ones(50), tokens_of(2, 25)).p_value is None
    assert change(np.zeros(50), np.ones(50), tokens_of(2, 25)).p_value is None
    assert change(np.ones(50), 2 * np.ones(50), tokens_of(1, 50)).p_value is None
