"""Which classes of modules to put into FP32 together."""

from __future__ import annotations

import numpy as np
import pytest

from mismatch_probe.metrics.ladder import Fix, cheapest, next_set


def test_what_a_fix_leaves_and_costs() -> None:
    rollout = np.zeros(4)
    base = ({"seconds": 2.0}, {"logprobs": np.array([2.0, -2.0, 2.0, np.nan])})
    part = ({"seconds": 3.0}, {"logprobs": np.array([1.0, 1.0, -1.0, 1.0])})
    fix = Fix.of(("head",), rollout, base, part)
    assert (fix.left, fix.cost) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_fix_that_breaks_tokens_closes_nothing() -> None:
    base = ({"seconds": 1.0}, {"logprobs": np.array([2.0, 2.0])})
    part = ({"seconds": 1.0}, {"logprobs": np.array([0.0, np.nan])})
    fix = Fix.of(("head",), np.zeros(2), base, part)
    assert np.isinf(fix.left)
    assert cheapest([fix], 0.9) is None


def test_classes_are_added_by_gain_for_their_time() -> None:
    singles = [Fix(("mlp",), 0.8, 1.0), Fix(("head",), 0.9, 0.0), Fix(("rope",), 0.99, 0.5), Fix(("norms",), 1.1, 0.0)]
    assert next_set(singles, 0.5) == ("head", "mlp")
    both = [*singles, Fix(("head", "mlp"), 0.7, 1.0)]
    assert next_set(both, 0.5) == ("head", "mlp", "rope")
    # A class that closes nothing by itself comes last.
    three = [*both, Fix(("head", "mlp", "rope"), 0.69, 1.5)]
    assert next_set(three, 0.5) == ("head", "mlp", "rope", "norms")
    assert next_set([*three, Fix(("head", "mlp", "rope", "norms"), 0.6, 1.5)], 0.5) is None


def test_a_target_that_is_met_ends_the_search() -> None:
    singles = [Fix(("mlp",), 0.8, 1.0), Fix(("head",), 0.85, 0.1)]
    assert next_set(singles, 0.85) is None
    best = cheapest(singles, 0.85)
    assert best is not None
    assert best.classes == ("head",)
    assert cheapest(singles, 0.5) is None


def test_nothing_to_add() -> None:
    assert next_set([], 0.5) is None
    assert next_set([Fix(("mlp",), 1.0, 0.0)], 0.5) is None  # the only class there is
