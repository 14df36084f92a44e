"""Scores of modules: what rounding lets two engines be, and which module stands out."""

from __future__ import annotations

import numpy as np
import pytest

from mismatch_probe.metrics.inside import THRESHOLD, UNIT, expected, first_beyond, growth, locate, relative, scores

LAYERS = [*range(4), *range(4)]  # two modules a layer
NAMES = [f"model.layers.{layer}.{module}" for module in ("q_proj", "o_proj") for layer in range(4)]

KINDS = ["module"] * 8


@pytest.mark.parametrize(("dtype", "rounded"), [("float16", np.float16), ("float32", np.float32)])
def test_two_roundings_of_one_number_are_as_far_apart_as_expected(dtype: str, rounded: type) -> None:
    """Two engines whose results differ before they are rounded, by more than a unit: independent roundings."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(100_000)
    one = exact.astype(rounded).astype(np.float64)
    error = np.sqrt(np.sum((one - exact) ** 2) / np.sum(exact**2))
    assert expected(np.array([0.0]), dtype)[0] == pytest.approx(np.sqrt(2) * error, rel=0.03)
    assert UNIT[dtype] == np.finfo(rounded).eps / 2


def test_scores_are_one_for_independent_errors_and_infinite_for_nan() -> None:
    found = scores(np.array([np.sqrt(2) * 0.01, np.nan, np.inf]), np.array([0.01, 0.01, 0.01]), "bfloat16")
    assert found[0] == pytest.approx(1)
    assert np.isinf(found[1:]).all()


def test_relative_errors_pool_sequences() -> None:
    assert relative(np.array([[1.0, 3.0]]), np.array([[100.0, 300.0]]))[0] == pytest.approx(0.1)


def test_nothing_stands_out_below_the_threshold() -> None:
    found = locate(NAMES, LAYERS, KINDS, np.full(8, THRESHOLD), 4)
    assert (found.verdict, found.name, found.layer, found.score) == ("no single layer", "", None, THRESHOLD)
    assert locate([], [], [], np.empty(0), 4).verdict == "no single layer"


def test_one_module_stands_out() -> None:
    values = np.ones(8)
    values[5] = 4.0
    found = locate(NAMES, LAYERS, KINDS, values, 4)
    assert (found.verdict, found.name, found.layer) == ("layer", "model.layers.1.o_proj", 1)


def test_the_same_module_of_most_layers_is_no_single_layer() -> None:
    values = np.ones(8)
    values[4:7] = 4.0
    found = locate(NAMES, LAYERS, KINDS, values, 4)
    assert (found.verdict, found.name, found.layer) == ("everywhere", "o_proj", None)


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    values = np.ones(8)
    values[[3, 6]] = np.inf
    found = locate(NAMES, LAYERS, KINDS, values, 4)
    assert (found.verdict, found.name, found.layer) == ("not finite", "model.layers.3.q_proj", 3)


def test_what_reaches_a_module_is_told_from_the_module() -> None:
    values, kinds = np.ones(8), [*KINDS[:4], *["between"] * 4]
    values[4:] = 3.0
    found = locate(NAMES, LAYERS, kinds, values, 4)
    assert (found.verdict, found.name, found.kind) == ("everywhere", "o_proj", "between")


def test_a_module_outside_of_the_layers() -> None:
    found = locate([*NAMES, "lm_head"], [*LAYERS, None], [*KINDS, "module"], np.array([*np.ones(8), 3.0]), 4)
    assert (found.verdict, found.name, found.layer) == ("outside", "lm_head", None)


def test_the_first_layer_beyond() -> None:
    assert first_beyond(np.array([1.0, 2.5, 3.0])) == 1
    assert first_beyond(np.array([1.0, 1.9])) is None


def test_growth_is_the_factor_of_a_geometric_error() -> None:
    depth = np.arange(12)[:, None]
    rng = np.random.default_rng(0)
    error = 1e-3 * 1.07**depth * np.exp(0.05 * rng.standard_normal((12, 8)))
    found = growth(error**2, np.ones((12, 8)))
    assert found.value == pytest.approx(1.07, rel=0.01)
    assert found.ci_low is not None
    assert found.ci_high is not None
    assert found.ci_low < 1.07 < found.ci_high
    # Another way to the same slope, sequence by sequence.
    slopes = [np.polyfit(depth[:, 0], np.log(error[:, s]), 1)[0] for s in range(8)]
    assert found.value == pytest.approx(np.exp(np.mean(slopes)), rel=1e-9)


def test_growth_needs_layers_and_differences() -> None:
    assert growth(np.ones((2, 4)), np.ones((2, 4))).value is None
    assert growth(np.zeros((5, 4)), np.ones((5, 4))).value is None
    one = growth(np.ones((5, 1)), np.ones((5, 1)))
    assert one.value == 1
    assert one.ci_low is None
