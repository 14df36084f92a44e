"""The report and the figures of an attribution: what is shown is what the document says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mismatch_probe.metrics.inside import ENDLESS
from mismatch_probe.metrics.ladder import NO_GAP
from mismatch_probe.report.attribution import attribution_report, plan_report
from mismatch_probe.report.figures import all_figures, draw, figures_of
from mismatch_probe.report.figures.style import ratio_ticks
from mismatch_probe.report.model import Table
from mismatch_probe.results.attribution import Attribution, AttributionPlan, PlannedProcess, PlannedSetting
from mismatch_probe.types import MetricValue
from tests.factories.attribution import (
    NO_FIXES,
    NO_LADDER,
    attribution,
    effect,
    faulty,
    inside,
    ladder,
    layers,
    metric,
    routers,
    setting,
    unchanged,
)
from tests.snapshot import assert_snapshots, screen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mismatch_probe.report.model import Report

DENSE = ["attribute-ladder", "attribute-settings", "attribute-layers", "attribute-lens", "attribute-fixes"]


def everything() -> Attribution:
    """A mixture of experts with a fault, and all that a report shows."""
    return attribution(
        layers=layers({"bfloat16": faulty(inside(4e-3)), "float16": inside(5e-4)}), experts=routers(), n_nonfinite=3
    )


def nothing() -> Attribution:
    """No pass is there."""
    no_layers = layers({}, "left out: --no-layers").model_copy(update={"eager_vs_compiled_shift": None})
    return attribution(
        ladder=NO_LADDER, settings=(), both_sides=(), layers=no_layers, fixes=NO_FIXES, experts=None, failed={}
    )


def test_snapshots() -> None:
    assert_snapshots("attribution", attribution_report(everything(), "runs/a"))


def test_a_document_is_what_it_was_when_it_comes_back(tmp_path: Path) -> None:
    for document in (everything(), nothing(), attribution()):
        document.write(tmp_path / "attribution.json")
        assert Attribution.read(tmp_path / "attribution.json") == document


def section_of(report: Report, name: str) -> Table:
    found = next(section for section in report.sections if section.name == name)
    return next(block for block in found.blocks if isinstance(block, Table))


def test_the_table_has_rungs_in_order_then_what_closes_most() -> None:
    table = attribution_report(attribution()).table
    assert table is not None
    names = [row[0].text for row in table.rows]
    assert names[:3] == ["decode → prefill", "rollout engine → trainer", "rollout batches → padded"]
    assert names[3:] == [
        "FP16, both sides",
        "float16 changed, trainer",
        "fp32-head changed, rollout",
        "the whole gap",
    ]
    assert [row[1].text for row in table.rows] == ["70.0 %", "60.0 %", "-30.0 %", "99.0 %", "51.0 %", "36.0 %", "100 %"]


def test_steps_name_the_exact_commands() -> None:
    head = setting("rollout", "fp32-head", effect(0.5), options=("--engine-arg", 'a={"b":1}'), environment={"X": "1"})
    report = attribution_report(attribution(settings=(head,), both_sides=(), failed={}), "runs/a b")
    commands = [step.command for step in report.steps if step.command]
    assert commands[0] == "mismatch-probe audit --model smollm2-135m"
    assert commands[1] == "mismatch-probe attribute --model smollm2-135m --num-prompts 256"
    assert commands[2] == (
        "X=1 mismatch-probe compare --model smollm2-135m --engine-arg 'a={\"b\":1}' --rollout-dtypes bfloat16 "
        "--trainer-dtypes bfloat16"
    )
    failed = attribution_report(attribution(), "runs/a b").steps[-1]
    assert failed.command == "mismatch-probe attribute --resume 'runs/a b'"


@pytest.mark.parametrize(
    ("document", "state"),
    [(everything(), "fail"), (nothing(), "inconclusive"), (attribution(failed={}), "ok"), (attribution(), "warn")],
)
def test_the_state_of_the_answer(document: Attribution, state: str) -> None:
    assert attribution_report(document).state == state


def test_many_layers_are_thinned_to_those_that_stand_out() -> None:
    document = attribution(layers=layers({"bfloat16": faulty(inside(4e-3, 40), layer=17)}))
    report = attribution_report(document)
    shown = [row[0].text for row in section_of(report, "layers").rows]
    assert len(shown) < 16
    assert {"0", "17", "39"} <= set(shown)
    assert [row[0].text for row in section_of(report, "modules").rows] == ["model.norm", "model.layers.17.mlp"]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_terminal_of_any_width_shows_it(width: int) -> None:
    for document in (everything(), nothing()):
        assert max(map(len, screen(attribution_report(document), width).splitlines())) <= max(
            [width, *(len(step.command) + 2 for step in attribution_report(document).steps)]
        )


def test_a_plan_lists_processes_and_settings() -> None:
    plan = AttributionPlan(
        model="m",
        device="cpu",
        passes=(PlannedProcess(name="hf-float32-cast", n_passes=1, seconds=60),),
        processes=(PlannedProcess(name="vLLM kv-fp8", n_passes=1, seconds=600),),
        settings=(PlannedSetting(name="a", change="A", why=""), PlannedSetting(name="b", change="B", why="no b")),
        seconds=660,
        disk_gib=1.5,
    )
    text = screen(plan_report(plan))
    assert all(word in text for word in ("11 min", "vLLM kv-fp8", "10 min", "60 s", "no b", "1.5 GiB"))


# Figures.


def drawn(name: str, document: Attribution) -> Figure:
    return all_figures()[f"attribute-{name}"].draw(document)


def names_of(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def points_of(axes: Axes) -> dict[float, float]:
    """x by y of single markers, without the arrows of intervals, which are integers."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1 and isinstance(line.get_marker(), str)]
    return {float(np.asarray(line.get_ydata())[0]): float(np.asarray(line.get_xdata())[0]) for line in lines}


def arrows_of(axes: Axes) -> list[float]:
    """y of intervals that go on beyond the panel."""
    lines = [line for line in axes.lines if isinstance(line.get_marker(), int)]
    return [float(np.asarray(line.get_ydata())[0]) for line in lines]


def line_of(axes: Axes, label: str) -> list[float]:
    line = next(line for line in axes.lines if line.get_label() == label)
    return [float(value) for value in np.asarray(line.get_ydata())]


def test_contributions_add_up_rung_by_rung() -> None:
    upper, lower = drawn("ladder", attribution()).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in upper.patches]  # type: ignore[attr-defined]
    assert np.array(bars) == pytest.approx(np.array([(0, 0.7), (0.7, 1.3), (1.3, 1.0), (0, 1.0)]))
    assert [bool(bar.get_hatch()) for bar in upper.patches] == [False, False, True, False]
    assert points_of(lower) == {i: pytest.approx(0.05 + 0.001 * i) for i in range(4)}
    without = ladder().model_copy(update={"passes": ()})
    assert len(drawn("ladder", attribution(ladder=without)).axes) == 1


def test_an_interval_without_an_end_in_sight_is_an_arrow() -> None:
    rungs = ladder().rungs
    wide = rungs[1].model_copy(update={"contribution": MetricValue(0.6, 0.5, 4.9e11)})
    document = attribution(ladder=ladder().model_copy(update={"rungs": (rungs[0], wide, rungs[2])}))
    upper, _ = drawn("ladder", document).axes
    assert upper.get_xlim()[1] < 2
    assert arrows_of(upper) == [1.0]


def test_settings_are_sorted_within_their_side_and_filled_where_they_differ() -> None:
    settings = (*attribution().settings, setting("rollout", "batch-invariant", effect(0.0)))
    (axes,) = drawn("settings", attribution(settings=settings)).axes
    assert names_of(axes) == [
        "rollout settings",
        "batch-invariant changed",
        "fp32-head changed †",
        "float16 changed",
        "prefix-cache changed",
        "batch-1 changed",
        "kv-fp8 changed",
        "trainer settings",
        "float16 changed",
    ]
    assert points_of(axes) == {2: 0.8, 3: 0.9, 4: 1.0, 5: 1.02, 6: 5.0, 8: 0.7}
    assert sorted(arrows_of(axes)) == [1.0, 6.0]  # no gap is left; an interval that goes on
    filled = [line for line in axes.lines if isinstance(line.get_marker(), str) and len(line.get_xdata()) == 1]
    assert [float(np.asarray(line.get_ydata())[0]) for line in filled if line.get_markerfacecolor() != "white"] == [
        2,
        6,
        8,
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.7, 6.0, [0.7, 1.0, 1.5, 2.0, 3.0, 5.0]),
        (0.1, 12.0, [0.1, 0.3, 1.0, 3.0, 10.0]),
        (0.979, 1.021, [0.98, 0.99, 1.0, 1.01, 1.02]),
    ],
)
def test_ticks_of_ratios_are_round_and_few(low: float, high: float, ticks: list[float]) -> None:
    assert ratio_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("high", [1.05, 1.3, 2.0, 4.0, 9.0, 40.0, 1e3, 1e6, 1e12, 1e30])
def test_every_axis_of_ratios_has_ticks(high: float) -> None:
    assert 2 <= len(ratio_ticks(0.9, high)) <= 10


def test_layers_are_drawn_as_they_are() -> None:
    document = attribution()
    figure = drawn("layers", document)
    upper, lower = figure.axes
    for dtype in ("bfloat16", "float16"):
        rows = document.layers.dtypes[dtype].layers
        assert line_of(upper, dtype) == [row.relative_error for row in rows]
        assert line_of(lower, dtype) == [row.score for row in rows]
    assert (upper.get_yscale(), lower.get_yscale()) == ("log", "linear")
    assert "float32 is missing: it ran out of memory" in figure.get_supxlabel().replace("\n", " ")
    (axes,) = drawn("lens", document).axes
    values = line_of(axes, "bfloat16")
    assert math.isnan(values[0])  # 0 has no place on a logarithmic axis
    assert values[1:] == [row.lens_kl for row in document.layers.dtypes["bfloat16"].layers[1:]]


def test_a_score_beyond_measure_is_an_arrow() -> None:
    document = attribution(layers=layers({"bfloat16": faulty(inside(4e-3), ENDLESS)}))
    lower = drawn("layers", document).axes[1]
    assert lower.get_yscale() == "log"
    assert lower.get_ylim()[1] < 1e4
    (arrow,) = [line for line in lower.lines if line.get_marker() == "^" and len(line.get_xdata()) == 1]
    assert np.asarray(arrow.get_xdata()).tolist() == [1]


def test_fixes_stand_beside_their_time() -> None:
    figure = drawn("fixes", attribution())
    left, right = figure.axes
    assert names_of(left) == ["head + mlp", "head", "norms"]
    assert points_of(left) == {0: 0.8, 1: 0.9, 2: 1.04}
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.7, 0.04, -0.09])  # type: ignore[attr-defined]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["the whole trainer in FP32: 0.780", "target: 0.850 or less", "cheapest set that meets the target"]


def test_routers_and_routes_are_drawn_as_they_are() -> None:
    left, right = drawn("experts", attribution(experts=routers())).axes
    assert np.asarray(left.lines[0].get_ydata()).tolist() == pytest.approx([0.99, 0.98, 0.97, 0.96])
    assert sorted((x, y) for y, x in points_of(right).items()) == [(0, 0.08), (1, pytest.approx(0.065 * 0.64))]


def test_only_what_there_is_is_drawn(tmp_path: Path) -> None:
    assert draw(nothing(), tmp_path) == {}
    assert [info.name for info in figures_of(attribution())] == DENSE
    first = draw(everything(), tmp_path / "a")
    again = draw(everything(), tmp_path / "b")
    assert list(first) == [*DENSE, "attribute-experts"]
    assert all(path.read_bytes() == again[name].read_bytes() for name, path in first.items())
    no_gap = MetricValue(None, why=NO_GAP)
    rungs = tuple(rung.model_copy(update={"contribution": no_gap}) for rung in ladder().rungs)
    without = attribution(ladder=ladder().model_copy(update={"rungs": rungs}))
    assert "attribute-ladder" not in [info.name for info in figures_of(without)]


def test_a_single_value_has_room(tmp_path: Path) -> None:
    one = replace(inside(4e-3, 1), layers=inside(0.0, 1).layers)
    errors = ladder().model_copy(
        update={"passes": tuple(p.model_copy(update={"error_rms": metric(0.0)}) for p in ladder().passes)}
    )
    document = attribution(
        settings=(setting("rollout", "prefix-cache", unchanged()),), ladder=errors, layers=layers({"bfloat16": one})
    )
    assert draw(document, tmp_path).keys() >= {"attribute-settings", "attribute-ladder", "attribute-layers"}
