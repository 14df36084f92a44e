"""Where a gap arises, and what both models' insides come to: each case, and that no two conclusions contradict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from mismatch_probe.metrics.conclusions import FP32_FLOOR, LEAST, Arises, Conclusion, Left, Rounding, arises, conclude
from mismatch_probe.metrics.inside import THRESHOLD, Inside
from mismatch_probe.metrics.ladder import UNCHANGED
from mismatch_probe.types import MetricValue
from tests.metrics.insides import BF16, FP16, FP32, NOT_COMPARED, quiet, results

PAIR = (BF16, BF16)


def codes(insides: dict[str, Inside], left: float | None = None, pair: tuple[str, str] = PAIR, **about: Any) -> Any:
    found = conclude(insides, pair, Left(left, None if left is None else 0.05), **({"routers": False} | about))
    return {dtype: c.code for dtype, c in found.dtypes.items()}, found.rounding


def test_the_end_of_a_layer_is_the_layers_own_code() -> None:
    """Layer 17 of the audit: its residual connection adds 1.03 times the MLP's output."""
    rows = {BF16: quiet(BF16), FP16: quiet(FP16, 20, end=50), FP32: quiet(FP32, 3e4, end=4e5)}
    found = conclude(rows, PAIR, Left(0.4, 0.05), routers=False)
    for dtype in (FP16, FP32):
        located = found.dtypes[dtype].located
        assert (found.dtypes[dtype].code, located.kind, located.layer, located.name) == ("fault", "end", 2, "m.2")
    assert found.rounding == Rounding("part", 0.4)
    assert found.dtypes[BF16].code == "absent"  # 4e5 FP32 roundings are more than BF16's, had it been there


def test_a_step_of_which_the_end_was_not_compared_is_the_layers_code_too() -> None:
    found = conclude({FP32: quiet(FP32, 3e4, ends=False)}, (FP32, FP32), routers=False).dtypes[FP32]
    assert (found.code, found.layers, found.ends, found.is_fault) == ("step", (2,), False, True)
    whole = conclude({FP32: quiet(FP32, 2.5)}, (FP32, FP32), routers=False).dtypes[FP32]
    assert (whole.code, whole.ends, whole.is_fault) == ("step", True, False)


def test_routers_excuse_a_step_in_any_dtype() -> None:
    """One token of gpt-oss' 576 goes to other experts in FP32, and layer 1's step has a score of 27,344."""
    rows = {BF16: quiet(BF16, 5, ends=False), FP32: quiet(FP32, 5, ends=False)}
    found = conclude(rows, PAIR, Left(1e-9, 1e-5), routers=True)
    assert [found.dtypes[d].is_fault for d in (BF16, FP32)] == [False, False]
    assert conclude(rows, PAIR, Left(0.3, 0.05), routers=True).rounding == Rounding("unknown", 0.3)
    assert conclude({**rows, FP32: quiet(FP32)}, PAIR, Left(1e-9, 1e-5), routers=True).rounding == Rounding(
        "cause", 1e-9
    )


@pytest.mark.parametrize(("score", "code"), [(1e2, "hidden"), (1e6, "absent")])
def test_what_fp32_shows_is_hidden_by_rounding_or_not_there(score: float, code: str) -> None:
    """One BF16 rounding is 2¹⁶ of FP32's."""
    found, _ = codes({BF16: quiet(BF16), FP32: quiet(FP32, between=score)}, 1e-6)
    assert found == {BF16: code, FP32: "fault"}


def test_what_stands_out_in_16_bits_alone_is_their_own() -> None:
    found, rounding = codes({BF16: quiet(BF16), FP16: quiet(FP16, module=5), FP32: quiet(FP32)}, 1e-6)
    assert found == {BF16: "quiet", FP16: "fault", FP32: "quiet"}
    assert rounding.code == "cause"
    # Of the pair's own dtype it has to be mended before anything is put down to rounding …
    assert codes({BF16: quiet(BF16, module=5), FP32: quiet(FP32)}, 1e-6)[1].code == "fault first"
    # … unless FP32 shows the same, and how little of the gap it makes.
    assert codes({BF16: quiet(BF16, module=5), FP32: quiet(FP32, module=9e4)}, 1e-3)[1].code == "cause"


@pytest.mark.parametrize(
    ("left", "code"), [(None, "unknown"), (1e-9, "cause"), (LEAST, "part"), (0.97, "part"), (0.99, "no cause")]
)
def test_rounding_is_what_fp32_does_not_leave(left: float | None, code: str) -> None:
    found, rounding = codes({BF16: quiet(BF16), FP32: quiet(FP32)}, left)
    assert rounding.code == code
    assert rounding.elsewhere == (code in ("part", "no cause"))
    assert found == {BF16: "quiet", FP32: "quiet"}


def test_what_fp32_rounds_itself_is_rounding_as_well() -> None:
    """A third of a gap of 3e-5 nats is torch's float32 log-softmax, unless the models' insides differ in FP32."""
    rows = {FP16: quiet(FP16), FP32: quiet(FP32)}
    assert conclude(rows, (FP16, FP16), Left(0.1, 1e-5), routers=False).rounding == Rounding("cause", 0.1)
    for wide in (quiet(FP32, end=9.0), quiet(FP32, stream=9.0)):
        assert conclude({**rows, FP32: wide}, (FP16, FP16), Left(0.1, 1e-5), routers=False).rounding.code == "part"


@pytest.mark.parametrize(
    ("inside", "rounding"),
    [
        (quiet(FP32), Rounding("cause")),
        (quiet(FP32, between=9.0), Rounding("no cause")),
        (quiet(FP32, stream=40.0), Rounding("no cause", elsewhere=True)),
        (quiet(FP32, stream=None), Rounding("unknown")),
        (NOT_COMPARED, Rounding("unknown")),
    ],
)
def test_a_pair_in_fp32_is_judged_by_the_error_against_float64(inside: Inside, rounding: Rounding) -> None:
    assert codes({FP32: inside}, None, (FP32, FP32))[1] == rounding


def test_a_tensor_that_is_not_finite_hides_nothing_of_others() -> None:
    found, _ = codes({BF16: quiet(BF16), FP16: quiet(FP16, module=np.inf), FP32: quiet(FP32)}, 1e-6)
    assert found == {BF16: "quiet", FP16: "not finite", FP32: "quiet"}


def part(value: float, half: float | None = None) -> MetricValue:
    return MetricValue(value) if half is None else MetricValue(value, value - half, value + half)


@pytest.mark.parametrize(
    ("contributions", "found"),
    [
        ({"a": part(0.8, 0.1), "b": part(0.3, 0.1), "c": part(-0.1, 0.1)}, Arises("one", ("a",))),
        ({"a": part(0.3, 0.3), "b": part(0.6, 0.3), "c": part(0.1, 0.01)}, Arises("undecided", ("b", "a"))),
        ({"a": part(0.3, 0.2), "b": part(0.7, 0.2)}, Arises("undecided", ("b", "a"))),  # they touch
        ({"a": part(0.9), "b": part(0.1)}, Arises("estimate", ("a",))),
        ({"a": part(0.9, 0.1), "b": part(0.1)}, Arises("undecided", ("a", "b"))),  # an interval is not known
        ({"a": part(1.0), "b": MetricValue(0.0, why=UNCHANGED)}, Arises("one", ("a",))),
        ({"a": MetricValue(None, why="there is no gap")}, Arises("nowhere")),
        ({}, Arises("nowhere")),
    ],
)
def test_a_rung_is_named_where_its_interval_allows_it(contributions: dict[str, MetricValue], found: Arises) -> None:
    assert arises(contributions) == found


@given(results())
@settings(max_examples=300, deadline=None)
def test_conclusions_never_contradict_each_other(given_: tuple[dict[str, Inside], tuple[str, str], Left, bool]) -> None:
    insides, pair, left, routers = given_
    found = conclude(insides, pair, left, routers=routers)
    assert found.dtypes.keys() == insides.keys()
    for dtype, conclusion in found.dtypes.items():
        assert_of_one(conclusion, insides[dtype])
        if conclusion.seen_in:  # hidden or absent: from what has more bits, and is beyond
            assert found.dtypes[conclusion.seen_in].stands_out
            assert conclusion.located == found.dtypes[conclusion.seen_in].located
    wide, rounding = found.dtypes.get(FP32, Conclusion("not compared")), found.rounding
    if rounding.code == "cause":
        assert left.fraction is None or left.fraction < LEAST or (left.rms or 0) <= FP32_FLOOR
        assert not (pair == (FP32, FP32) and wide.is_fault)
        for dtype in set(pair) & found.dtypes.keys():
            assert not found.dtypes[dtype].is_fault or found.dtypes[dtype].place == wide.place
    if rounding.elsewhere:
        assert wide.code == "quiet"
        assert rounding.code in ("part", "no cause")


def assert_of_one(found: Conclusion, inside: Inside) -> None:
    """A conclusion says of a dtype what its rows say, whatever the others show."""
    steps = [row.score for row in inside.layers]
    beyond = [tensor.score for tensor in inside.tensors if tensor.score > THRESHOLD]
    assert (found.code == "not compared") == (inside.located is None)
    assert (found.code in ("fault", "not finite")) == bool(beyond)
    assert (found.code == "step") == (not beyond and max(steps, default=0.0) > THRESHOLD)
    if found.code in ("quiet", "hidden", "absent"):
        assert found.score <= THRESHOLD
        assert not found.is_fault
