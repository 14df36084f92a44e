"""Runs of a constant: what chance makes is left alone whatever log-probs are rounded to, what it does not is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.chunks import ExcludedValue, Unusable, usable
from mismatch_probe.metrics.constants import constant_runs
from mismatch_probe.types import PairArrays

Floats = NDArray[np.float64]
ROUNDINGS: dict[str, Callable[[Floats], Floats]] = {
    "float64": lambda v: v,
    "float32": lambda v: v.astype(np.float32).astype(np.float64),
    "bfloat16": lambda v: to_bits(v, 8),
    "float16": lambda v: to_bits(v, 11),
    "logits of ¼": lambda v: np.rint(v * 4) / 4,
    "logits of ⅛": lambda v: np.rint(v * 8) / 8,
    "logits of 1/32": lambda v: np.rint(v * 32) / 32,
    "bfloat16 probabilities": lambda v: np.log(to_bits(np.exp(v), 8)).astype(np.float32).astype(np.float64),
    "float16 probabilities": lambda v: np.log(to_bits(np.exp(v), 11)).astype(np.float32).astype(np.float64),
    **{f"{k} decimals": (lambda v, k=k: np.round(v, k)) for k in range(1, 7)},
}
CONSTANTS = (-0.5, -1.0, -13.8155, math.log(1e-6), -math.log(50_257), -math.log(32_768), -0.1, -11.75)


def to_bits(values: Floats, bits: int) -> Floats:
    """Rounded to a significand of so many bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2.0**bits) / 2.0**bits, exponent)


def clean(n: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Log-probs of both sides whose sureness is autocorrelated, as in text: half near-certain, with stretches of it."""
    rng = np.random.default_rng(seed)
    margin = np.empty(n)
    margin[0], steps = 0.0, rng.normal(0, 1, n)
    for i in range(1, n):
        margin[i] = 0.8 * margin[i - 1] + 0.6 * steps[i]
    margin = 2.5 + 3.5 * margin
    return -np.logaddexp(0, -margin), -np.logaddexp(0, -(margin + rng.normal(0, 0.05, n)))


def places(lengths: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequence and position of tokens."""
    return np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("length", [5, 40, 1000])
def test_no_false_alarm_on_clean_log_probs(rounding: str, length: int) -> None:
    n = 200_000
    b, a = (ROUNDINGS[rounding](side) for side in clean(n))
    sequence, position = places([length] * (n // length))
    for own, other in ((b, a), (a, b), (b, None), (a, None)):
        assert not constant_runs(own, sequence, position, other).any()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("value", CONSTANTS)
def test_padding_is_found_whatever_the_rest_is_rounded_to(rounding: str, value: float) -> None:
    b, a = (ROUNDINGS[rounding](side) for side in clean(400))
    run = slice(300, 350)
    b[run] = rounded = ROUNDINGS[rounding](np.array([value]))[0]
    if rounded > -1 / 16:
        pytest.skip("rounds to 0, which has a rule of its own")
    sequence, position = places([400])
    for other in (a, None):
        got = constant_runs(b, sequence, position, other)
        assert got[run].all()
        # A neighbour with the same value by chance cannot be told from the run.
        assert (b[got] == b[run.start]).all()
        assert got.sum() <= 52


@given(st.integers(2, 14), st.floats(-30, -1 / 16), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_a_run_in_float32_data_is_judged_by_its_chance(length: int, value: float, start: int) -> None:
    b = -np.random.default_rng(1).exponential(1.0, 60).astype(np.float32).astype(np.float64) - 0.07
    b[start : start + length] = value
    sequence, position = places([60])
    chance = min(0.5, 0.5 * 1e-4 / -value)
    needed = max(4, 1 + math.ceil(math.log(1e-12) / math.log(chance)))
    got = constant_runs(b, sequence, position)
    assert got.sum() == (length if length >= needed else 0)
    assert got[start : start + length].all() == (length >= needed)


@pytest.mark.parametrize(
    ("rounding", "longest"),
    [("float32", 3), ("float16", 4), ("bfloat16", 5), ("bfloat16 probabilities", 5), ("logits of ⅛", 9)],
)
def test_a_coarser_grid_needs_a_longer_run(rounding: str, longest: int) -> None:
    b = ROUNDINGS[rounding](clean(400)[0])
    value = ROUNDINGS[rounding](np.array([-1.5]))[0]
    b[b == value] = b[0]
    for length, want in ((longest, 0), (longest + 1, longest + 1)):
        spoiled = b.copy()
        spoiled[200 : 200 + length] = value
        assert constant_runs(spoiled, *places([400])).sum() == want


def test_a_run_ends_with_its_sequence_and_where_masked_tokens_lie_between() -> None:
    b, _ = clean(80)
    b[36:44] = -1.0
    whole = constant_runs(b, *places([80]))
    assert np.flatnonzero(whole).tolist() == list(range(36, 44))
    assert constant_runs(b, *places([39, 41])).sum() == 5  # 3 + 5 of them
    sequence, position = places([80])
    position[40:] += 3
    assert constant_runs(b, sequence, position).sum() == 8
    position[38:] += 3
    position[42:] += 3
    assert not constant_runs(b, sequence, position).any()


def test_near_certain_runs_are_left_alone() -> None:
    for value in (0.0, -1.1920929e-07, -1.9073486e-06, -1e-3, -0.06):
        b, a = clean(300)
        b[100:200] = value
        a[100:200] = np.random.default_rng(0).uniform(-0.2, 0, 100)
        assert not constant_runs(b, *places([300]), a).any()


def test_a_model_with_random_weights_in_bfloat16_is_left_alone() -> None:
    """All its log-probs are one value, on both sides."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 500))
    b, a = to_bits(-10.4 + noise, 8)
    assert len(np.unique(b)) <= 2
    assert not constant_runs(b, *places([100] * 5), a).any()
    assert constant_runs(b, *places([100] * 5), a - 1.0).any()


def test_a_constant_of_both_sides_is_found_in_fine_data() -> None:
    b, a = clean(300)
    b[100:120] = a[100:120] = -0.7
    got = Unusable.of(b, a, *places([300]))
    assert {side: int(runs.sum()) for side, runs in got.constant.items()} == {"rollout": 20, "trainer": 20}


def test_zeros_of_a_run_that_is_mostly_contradicted_all_go() -> None:
    b, a = clean(60)
    b[20:30] = 0.0
    a[20:30] = [-3, -2, -0.01, -5, -0.001, -1, -4, -0.2, -0.9, -2]
    why = Unusable.of(b, a, *places([60]))
    assert np.flatnonzero(why.any).tolist() == list(range(20, 30))
    assert np.flatnonzero(why.constant["rollout"]).tolist() == [22, 24, 27]
    a[20:26] = -0.01  # then 4 of 10 are contradicted
    assert Unusable.of(b, a, *places([60])).any.sum() == 3


def pair_of(b: Floats, a: Floats, lengths: list[int], **columns: Any) -> PairArrays:
    sequence, position = places(lengths)
    pair = PairArrays(b, a, sequence, position, np.zeros(len(lengths), np.int64), ("p",), columns=columns)
    return replace(pair, usable=usable(b, a, sequence, position, columns.get("weight_version")))


def test_constants_and_unsampled_tokens_are_counted_by_kind() -> None:
    b, a = clean(400)
    b[50:70], b[90], b[95], b[120:150] = -1.0, -9999.0, np.nan, -9999.0
    version = np.zeros(400)
    version[90:93] = -1
    excluded = as_sums(pair_of(b, a, [100, 300], weight_version=version)).excluded
    assert excluded.rows() == [
        ExcludedValue("rollout", "sentinel", "-9999", 31),
        ExcludedValue("rollout", "nonfinite", "nan", 1),
        ExcludedValue("rollout", "constant", "-1", 20),
        ExcludedValue("rollout", "unsampled", "weight_version -1", 3),
    ]
    assert excluded.n_tokens == 20 + 32 + 2


def test_both_means_are_given_for_constants() -> None:
    b, a = clean(400)
    b[50:70] = -1.0
    sums = as_sums(pair_of(b, a, [400]))
    rest = np.r_[0:50, 70:400]
    assert sums.mean_abs_all_finite == pytest.approx(np.abs(a - b).mean())
    assert np.abs(sums.log_ratio.whole()).mean() == pytest.approx(np.abs(a - b)[rest].mean())


def test_many_constants_are_counted_together() -> None:
    b, a = clean(4000)
    for i in range(9):
        b[100 * i : 100 * i + 12 + i] = -1.5 - i
    rows = as_sums(pair_of(b, a, [4000])).excluded.rows()
    assert [row.value for row in rows] == ["-9.5", "-8.5", "-7.5", "-6.5", "-5.5", "< 0"]
    assert [row.n for row in rows] == [20, 19, 18, 17, 16, 12 + 13 + 14 + 15]


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 30), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_sequence_is_judged_by_itself(seed: int, lengths: list[int]) -> None:
    """So that a pair can come in chunks of whole sequences."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    b, a = (np.round(rng.choice([-1.0, -0.5, -2.25, 0.0], n) + rng.choice([0, 1e-3], n), 4) for _ in range(2))
    b, a = np.minimum(b, 0), np.minimum(a, 0)
    whole = usable(b, a, *places(lengths))
    ends = np.cumsum(lengths)
    parts = [
        usable(b[end - length : end], a[end - length : end], *places([length]))
        for end, length in zip(ends, lengths, strict=True)
    ]
    assert np.array_equal(whole, np.concatenate(parts))
