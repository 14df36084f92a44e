"""How many more prompts a precision needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mismatch_probe.metrics.intervals import Estimate, evaluate
from mismatch_probe.metrics.power import prompts_needed
from mismatch_probe.metrics.sample import usable_tokens
from mismatch_probe.metrics.summary import token_metrics


def estimate(pair: Any, key: str = "mean_abs_logprob_diff") -> Estimate:
    result = token_metrics()[key](usable_tokens(pair))
    assert isinstance(result, Estimate)
    return result


def test_independent_normal_tokens(make_pair: Any) -> None:
    """|d| of a half-normal has coefficient of variation √(π/2 − 1), so ±5 % takes (1.96 · cv / 0.05)² prompts.

    The upper 90 % limit of a variance of 400 values is 9 % above it.
    """
    d = np.random.default_rng(0).normal(0, 1, 400)
    total = 400 + (prompts_needed(estimate(make_pair(-1.0, d))).more or 0)
    assert total == pytest.approx(1.09 * (1.96 / 0.05) ** 2 * (np.pi / 2 - 1), rel=0.15)


def test_what_is_asked_for_is_enough(make_pair: Any) -> None:
    """From 64 prompts, ±10 % is reached in 9 of 10 cases; 28 of 40 or fewer would have a probability below 1e-3."""
    reached = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        more = prompts_needed(estimate(make_pair(-1.0, rng.exponential(1, 64))), 0.1).more
        assert more is not None
        then = evaluate({"then": estimate(make_pair(-1.0, rng.exponential(1, 64 + more)))}, seed=0, replicates=200)
        value, low, high = then["then"].value, then["then"].ci_low, then["then"].ci_high
        assert value is not None
        assert low is not None
        assert high is not None
        reached.append((high - low) / 2 / value <= 0.1)
    assert sum(reached) > 28


def test_that_many_prompts_do_reach_it(make_pair: Any) -> None:
    rng = np.random.default_rng(1)
    needed = prompts_needed(estimate(make_pair(-1.0, rng.laplace(0, 1, 200))), 0.1)
    assert needed.more is not None
    assert needed.half_width is not None
    assert needed.half_width > 0.1
    more = prompts_needed(estimate(make_pair(-1.0, rng.laplace(0, 1, 200 + needed.more))), 0.1)
    assert more.half_width is not None
    assert 0.07 < more.half_width <= 0.1
    assert prompts_needed(estimate(make_pair(-1.0, rng.laplace(0, 1, 4 * (200 + needed.more)))), 0.1).more == 0


def test_rounded_up_to_two_digits_and_falling_with_the_precision(make_pair: Any) -> None:
    one = estimate(make_pair(-1.0, np.random.default_rng(2).normal(0, 1, 64)), "kl_k3")
    previous = np.inf
    for precision in (0.01, 0.02, 0.05, 0.1, 0.3, 5.0):
        more = prompts_needed(one, precision).more
        assert more is not None
        assert more <= previous
        assert len(str(more).rstrip("0")) <= 2
        previous = more
    assert previous == 0


def test_square_root_scale_needs_a_quarter(make_pair: Any) -> None:
    """The relative error of √m is half that of m."""
    pair = make_pair(-1.0, np.random.default_rng(3).normal(0, 1, 300))
    of_square, of_root = (prompts_needed(estimate(pair, key), 0.01).more for key in ("kl_k2", "rms_logprob_diff"))
    assert of_square is not None
    assert of_root is not None
    assert (of_square + 300) / (of_root + 300) == pytest.approx(4, rel=0.05)


def test_where_it_does_not_apply(make_pair: Any) -> None:
    assert "value is 0" in prompts_needed(estimate(make_pair(-1.0, np.zeros(64)))).why
    few = prompts_needed(estimate(make_pair(-1.0, [0.1, 0.2, 0.3, 0.1, 0.2])))
    assert (few.more, few.why) == (None, "5 prompts are too few to tell: 6 are needed")
    assert prompts_needed(estimate(make_pair(-1.0, np.full(64, 0.1)))).more == 0
    centred = np.tile([1.0, -1.0], 32) + 1e-9
    assert prompts_needed(estimate(make_pair(-1.0, centred), "kl_k1")).why == "more than 1e+09 prompts"
    with pytest.raises(ValueError, match="not positive"):
        prompts_needed(estimate(make_pair(-1.0, [0.1, 0.2])), 0)
