"""Shares that corrections touch, against a loop over sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.metrics.corrections import CORRECTIONS, touched_shares
from mismatch_probe.types import PairArrays


def pair(d: list[list[float]], prompts: list[int]) -> PairArrays:
    lengths = [len(row) for row in d]
    flat = np.concatenate([np.array(row, np.float64) for row in d]) if d else np.zeros(0)
    sequence = np.repeat(np.arange(len(d)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths]) if d else np.zeros(0, np.int64)
    names = tuple(f"p{i}" for i in range(max(prompts, default=-1) + 1))
    return PairArrays(-np.ones(len(flat)), flat - 1.0, sequence, position, np.array(prompts), names)


def by_hand(d: list[list[float]]) -> dict[str, float]:
    tokens = sum(len(row) for row in d if np.isfinite(row).all())
    found = {}
    for c in filter(lambda c: c.bounded, CORRECTIONS.values()):
        hits = 0
        for row in d:
            if not np.isfinite(row).all():
                continue
            for x in row:
                log = {"token": x, "sequence": sum(row), "geometric": sum(row) / len(row)}[c.level]
                hits += log > math.log(c.high) or (c.low > 0 and log < math.log(c.low))
        found[c.name] = hits / tokens
    return found


@given(st.integers(0, 300))
def test_shares_are_those_of_a_loop(seed: int) -> None:
    draw = np.random.default_rng(seed)
    d = [draw.normal(0, 0.6, draw.integers(1, 9)).tolist() for _ in range(8)]
    found = touched_shares([pair(d, [0, 0, 1, 1, 2, 2, 3, 3])])
    for name, share in by_hand(d).items():
        assert found[name].value == pytest.approx(share)
        low, high = found[name].ci_low, found[name].ci_high
        assert low is not None
        assert high is not None
        assert low <= share <= high


def test_chunks_add_up() -> None:
    draw = np.random.default_rng(1)
    d = [draw.normal(0, 0.8, 5).tolist() for _ in range(6)]
    whole = touched_shares([pair(d, [0, 1, 2, 0, 1, 2])])
    parts = touched_shares([pair(d[:3], [0, 1, 2]), pair(d[3:], [0, 1, 2])])
    assert whole == parts


def test_a_sequence_with_a_token_that_is_not_finite_is_left_out() -> None:
    found = touched_shares([pair([[0.0, float("nan")], [1.0, 1.0], [0.0]], [0, 1, 2])])
    assert found["token-tis"].value == pytest.approx(2 / 3)


def test_the_same_policy_is_never_touched() -> None:
    found = touched_shares([pair([[0.0] * 50] * 6, [0, 1, 2, 3, 4, 5])])
    for share in found.values():
        assert share.value == 0
        assert share.ci_high == pytest.approx(3.69 / 300, rel=1e-2)  # a Poisson count of none


def test_nothing_finite_says_so() -> None:
    found = touched_shares([pair([[float("inf")]], [0])])
    assert found["seq-tis"].value is None
    assert "usable" in found["seq-tis"].why
