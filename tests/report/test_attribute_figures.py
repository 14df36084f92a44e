"""Figures of an attribution: what is drawn is what the document says, and what it lacks is not drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mismatch_probe.report.attribute_rows import ratio_ticks
from mismatch_probe.report.figures.attribute import draw_attribution, fixes_figure, knobs_figure, ladder_figure
from mismatch_probe.report.figures.inside import experts_figure, layers_figure, lens_figure
from mismatch_probe.report.names import ATTRIBUTE_GUIDES
from tests.report.attribute_documents import (
    LAYERS,
    attribution,
    bare,
    empty,
    faulty,
    hostile,
    judged,
    knob,
    metric,
    nulls,
    routers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = ["attribute-ladder", "attribute-knobs", "attribute-layers", "attribute-lens", "attribute-fixes"]


def texts_of(figure: Figure) -> str:
    return " | ".join(text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title))


def names_of(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def bars_of(axes: Axes) -> list[tuple[float, float]]:
    """(from, to) of horizontal bars, from top to bottom."""
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]


def points_of(axes: Axes) -> dict[float, float]:
    """x by y of single markers, without the arrows of intervals, which are integers."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1 and isinstance(line.get_marker(), str)]
    return {float(np.asarray(line.get_ydata())[0]): float(np.asarray(line.get_xdata())[0]) for line in lines}


def arrows_of(axes: Axes) -> list[float]:
    """y of intervals that go on beyond the panel."""
    lines = [line for line in axes.lines if isinstance(line.get_marker(), int)]
    return [float(np.asarray(line.get_ydata())[0]) for line in lines]


def segments_of(axes: Axes) -> dict[float, tuple[float, float]]:
    """Horizontal intervals by y."""
    found = [line for collection in axes.collections for line in getattr(collection, "get_segments", list)()]
    return {float(a[1]): (float(a[0]), float(b[0])) for a, b in found if a[1] == b[1]}


def line_of(axes: Axes, label: str) -> list[float]:
    line = next(line for line in axes.lines if line.get_label() == label)
    return np.asarray(line.get_ydata()).tolist()


def test_shares_add_up_rung_by_rung() -> None:
    upper, lower = ladder_figure(attribution()).axes
    assert names_of(upper) == [
        "decode → prefill",
        "vLLM → Hugging Face",
        "batched as it is trained",
        "all of the gap",
    ]
    assert np.array(bars_of(upper)) == pytest.approx(np.array([(0, 0.7), (0.7, 1.3), (1.3, 1.0), (0, 1.0)]))
    assert [bool(bar.get_hatch()) for bar in upper.patches] == [False, False, True, False]
    ends = segments_of(upper)
    assert [ends[y] for y in (0.0, 1.0, 2.0)] == [
        pytest.approx(pair) for pair in ((0.63, 0.77), (1.24, 1.36), (0.97, 1.03))
    ]
    text = texts_of(ladder_figure(attribution()))
    assert "-30.0 %" in text
    assert "6.00e-2 [5.40e-2, 6.60e-2]" in text
    assert points_of(lower) == {i: pytest.approx(0.05 + 0.001 * i) for i in range(4)}
    assert lower.get_xlim()[0] == 0


def test_an_interval_without_an_end_in_sight_is_an_arrow() -> None:
    document = attribution()
    document["ladder"]["rungs"][1]["share"] = {"value": 0.6, "ci_low": 0.5, "ci_high": 4.9e11}
    upper, _ = ladder_figure(document).axes
    assert upper.get_xlim()[1] < 2
    assert arrows_of(upper) == [1.0]


def test_without_an_anchor_there_is_one_panel() -> None:
    document = attribution()
    document["ladder"]["anchor"] = []
    assert len(ladder_figure(document).axes) == 1


def test_settings_are_sorted_within_their_side() -> None:
    (axes,) = knobs_figure(attribution()).axes
    assert names_of(axes) == [
        "rollout settings",
        "fp32-head changed †",
        "prefix-cache changed",
        "batch-1 changed",
        "kv-fp8 changed",
        "trainer settings",
        "float16 changed",
    ]
    assert points_of(axes) == {1: 0.8, 2: 1.0, 3: 1.02, 4: 5.0, 6: 0.7}
    assert axes.get_xscale() == "log"
    assert any(np.all(np.asarray(line.get_xdata()) == 1.0) for line in axes.lines)
    assert arrows_of(axes) == [4.0]
    low, high = axes.get_xlim()
    assert low < 0.7 * 0.95
    assert 5.0 < high < 150.0


def test_what_is_sure_is_filled_and_what_is_not_says_why() -> None:
    figure = knobs_figure(attribution())
    (axes,) = figure.axes
    faces = {
        float(np.asarray(line.get_ydata())[0]): line.get_markerfacecolor()
        for line in axes.lines
        if len(line.get_xdata()) == 1 and isinstance(line.get_marker(), str)
    }
    assert [y for y, face in faces.items() if face != "white"] == [1, 4, 6]
    text = texts_of(figure)
    assert "1.00 no token changed" in text
    assert "0.800 [0.760, 0.840]" in text
    assert "1.50×" in text
    assert text.count("–") == 1
    assert figure.get_supxlabel() == "† see its note in the table of settings"


def test_a_setting_that_leaves_no_gap_comes_first_as_an_arrow_and_one_in_doubt_is_empty() -> None:
    document = attribution()
    document["knobs"] += [
        knob("rollout", "batch-invariant", 0.0),
        knob("rollout", "eager", 0.9, **judged(0.13)),
    ]
    (axes,) = knobs_figure(document).axes
    assert names_of(axes)[:4] == [
        "rollout settings",
        "batch-invariant changed",
        "fp32-head changed †",
        "eager changed",
    ]
    assert 1.0 in arrows_of(axes)
    empty = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert 3.0 in [float(np.asarray(line.get_ydata())[0]) for line in empty]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.7, 6.0, [0.7, 1.0, 1.5, 2.0, 3.0, 5.0]),
        (0.1, 12.0, [0.1, 0.3, 1.0, 3.0, 10.0]),
        (0.979, 1.021, [0.98, 0.99, 1.0, 1.01, 1.02]),
        (0.89, 1.21, [0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]),
    ],
)
def test_ticks_of_ratios_are_round_and_few(low: float, high: float, ticks: list[float]) -> None:
    assert ratio_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("high", [1.05, 1.3, 2.0, 4.0, 9.0, 40.0, 1e3, 1e6, 1e12, 1e30])
def test_every_axis_of_ratios_has_ticks(high: float) -> None:
    assert 2 <= len(ratio_ticks(0.9, high)) <= 10


def test_layers_are_drawn_as_they_are() -> None:
    document = attribution()
    upper, lower = layers_figure(document).axes
    for dtype in ("bfloat16", "float16"):
        rows = document["layers"]["dtypes"][dtype]["layers"]
        assert line_of(upper, dtype) == [row["relative_error"] for row in rows]
        assert line_of(lower, dtype) == [row["score"] for row in rows]
    assert upper.get_yscale() == "log"
    assert lower.get_yscale() == "linear"
    assert any(np.all(np.asarray(line.get_ydata()) == 2.0) for line in lower.lines)
    note = layers_figure(document).get_supxlabel()
    assert "in eager mode. Between eager and compiled lies an RMS of 1.23e-2 nats." in note.replace("\n", " ")
    assert "float32 is missing: it ran out of memory" in note.replace("\n", " ")


def test_a_score_beyond_measure_is_an_arrow() -> None:
    lower = layers_figure(faulty(1e30)).axes[1]
    assert lower.get_yscale() == "log"
    assert lower.get_ylim()[1] < 1e4
    (arrow,) = [line for line in lower.lines if line.get_marker() == "^" and len(line.get_xdata()) == 1]
    assert np.asarray(arrow.get_xdata()).tolist() == [11]
    assert max(line_of(lower, "bfloat16")) <= 1e3


def test_the_lens_is_drawn_where_it_is_above_zero() -> None:
    document = attribution()
    (axes,) = lens_figure(document).axes
    values = line_of(axes, "bfloat16")
    assert math.isnan(values[0])
    assert values[1:] == [row["lens_kl"] for row in document["layers"]["dtypes"]["bfloat16"]["layers"][1:]]


def test_layers_that_do_not_differ_say_so() -> None:
    document = attribution()
    for row in document["layers"]["dtypes"].values():
        for layer in row["layers"]:
            layer |= {"relative_error": 0.0, "score": 0.0, "lens_kl": 0.0}
    assert "the engines do not differ" in texts_of(layers_figure(document))


def test_fixes_stand_beside_their_time() -> None:
    figure = fixes_figure(attribution())
    left, right = figure.axes
    assert names_of(left) == ["head + mlp", "head", "norms"]
    assert points_of(left) == {0: 0.8, 1: 0.9, 2: 1.04}
    assert np.array(bars_of(right)) == pytest.approx(np.array([(0, 0.7), (0, 0.04), (0, -0.09)]))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["the whole trainer in FP32: 0.780", "target: 0.850 or less", "cheapest set that meets the target"]
    stars = [line for line in left.lines if line.get_marker() == "*"]
    assert [np.asarray(star.get_ydata()).tolist() for star in stars] == [[0]]


def test_where_an_fp32_trainer_closes_nothing_no_set_is_marked() -> None:
    document = attribution()
    document["fixes"] |= {"target": 1.0, "cheapest": {"classes": ["head"], "left": 0.9, "cost": 0.04}}
    figure = fixes_figure(document)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the whole trainer in FP32: 0.780"]
    assert not any(line.get_marker() == "*" for line in figure.axes[0].lines)


def test_routers_and_routes_are_drawn_as_they_are() -> None:
    document = attribution(experts=routers())
    left, right = experts_figure(document).axes
    assert np.asarray(left.lines[0].get_ydata()).tolist() == pytest.approx([0.99, 0.98, 0.97, 0.96])
    assert sorted((x, y) for y, x in points_of(right).items()) == [(0, 0.08), (1, pytest.approx(0.065 * 0.64))]
    assert "5.00 % of the tokens differ in some layer" in texts_of(experts_figure(document))
    assert right.get_ylim()[0] == 0


def test_only_what_there_is_is_drawn(tmp_path: Path) -> None:
    assert draw_attribution(empty(), tmp_path) == {}
    assert list(draw_attribution(attribution(), tmp_path)) == DENSE
    document = attribution()
    for row in document["layers"]["dtypes"].values():
        for layer in row["layers"]:
            layer["lens_kl"] = None
    document["ladder"]["rungs"][0]["share"] = bare(None, "there is no gap")
    assert list(draw_attribution(document, tmp_path)) == ["attribute-knobs", "attribute-layers", "attribute-fixes"]


@pytest.mark.parametrize("make", [lambda: attribution(experts=routers()), nulls, hostile])
def test_files_are_written_alike_twice(make: Any, tmp_path: Path) -> None:
    first, again = (draw_attribution(make(), tmp_path / name) for name in ("a", "b"))
    assert list(first) == list(ATTRIBUTE_GUIDES)
    for name, path in first.items():
        assert path.name == f"{name.removeprefix('attribute-')}.png"
        assert path.read_bytes() == again[name].read_bytes()


def test_a_single_value_has_room(tmp_path: Path) -> None:
    document = attribution()
    document["knobs"] = [document["knobs"][1]]
    document["ladder"]["anchor"] = [{"level": "trained", "error_rms": metric(0.0)}]
    for row in document["layers"]["dtypes"].values():
        row["layers"] = row["layers"][:1]
    assert draw_attribution(document, tmp_path).keys() >= {"attribute-knobs", "attribute-ladder", "attribute-layers"}


def test_every_dtype_has_every_layer() -> None:
    upper, _ = layers_figure(attribution()).axes
    assert all(len(line.get_xdata()) == LAYERS for line in upper.lines)
