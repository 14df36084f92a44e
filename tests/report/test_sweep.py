"""Report and figures of a sweep."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mismatch_probe.report.data import STRESS_NOTE
from mismatch_probe.report.figures import draw, figures_of
from mismatch_probe.report.figures.rl import arm_look, curves_figure, dose_figure, equal_ess_figure
from mismatch_probe.report.sweep import sweep_report
from mismatch_probe.results.sweep import RlSweep
from tests.factories.rl_run import steps
from tests.factories.sweep import (
    ARMS,
    CLEAR,
    NOISE,
    PLACE,
    arm,
    compared,
    comparison,
    matched,
    summary,
    sweep_data,
)
from tests.snapshot import assert_snapshots


def test_the_report_of_a_sweep() -> None:
    comparisons = compared(comparison("BF16", CLEAR[:8]), comparison("NOISE2", NOISE), comparison("NOWHERE", CLEAR[:3]))
    shown = summary(
        comparisons=comparisons, dose_response=matched(), places=(PLACE,), n_planned=21, failures={"late": "no sync"}
    )
    assert_snapshots("sweep", sweep_report(sweep_data(shown)))


@pytest.mark.parametrize("arms", [ARMS, ARMS[:1], (arm(n_runs=0),), (arm(n_runs=1), arm("b", n_runs=1))])
@pytest.mark.parametrize("pairs", [(), (comparison("A", CLEAR),), (comparison("A", CLEAR[:2]),)])
@pytest.mark.parametrize("more", [{}, {"dose_response": matched(), "places": (PLACE,)}, {"failures": {"x": "why"}}])
def test_every_report_has_an_answer_and_exact_commands(arms: Any, pairs: Any, more: dict[str, Any]) -> None:
    report = sweep_report(sweep_data(summary(arms=arms, comparisons=compared(*pairs), **more)))
    assert 1 <= len(report.answer) <= 2
    assert all(shlex.split(step.command)[:2] == ["mismatch-probe", "rl"] for step in report.steps)
    assert report.table is not None
    assert len(report.table.rows) == len(arms)
    assert (report.state == "fail") >= bool(more.get("failures"))


def test_the_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    shown = summary(comparisons=compared(comparison("A", CLEAR)), dose_response=matched(), places=(PLACE,))
    document = sweep_data(shown).sweep
    document.write(tmp_path / "sweep.json")
    assert RlSweep.read(tmp_path / "sweep.json") == document


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_dose_figure_places_every_arm_where_it_was_measured() -> None:
    figure = dose_figure(sweep_data(summary()))
    reward = figure.axes[0]
    filled = [line for line in reward.lines if line.get_marker() not in ("None", None) and len(line.get_xdata()) == 1]
    places = {(round(float(line.get_xdata()[0]), 3), round(float(line.get_ydata()[0]), 3)) for line in filled}
    assert {(0.9, 0.8), (0.3, 0.4), (0.6, 0.7), (0.61, 0.75)} <= places
    assert (0.9, 0.9) in places  # the clean weights, hollow
    path = next(line for line in reward.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 0.6)
    assert path.get_xdata().tolist() == [0.6, 0.3]  # doses in their order
    assert "0.1" in _texts(reward)
    assert any("2 of 4 lost" in text for text in _texts(figure.axes[2]))
    assert STRESS_NOTE in figure.get_suptitle()
    assert figure.axes[1].get_xscale() == "log" or figure.axes[3].get_xscale() == "log"


def test_remedies_look_otherwise_and_no_mismatch_has_no_place_on_a_log_axis() -> None:
    plain, replay = arm("bf16", precision="bfloat16"), arm("r", precision="bfloat16", remedy="routing-replay")
    control = arm("c", precision="bfloat16", remedy="zero-mismatch", ess=1.0, gap=0.0, collapsed=1)
    looks = [arm_look(one) for one in (plain, replay, control)]
    assert len({look.color for look in looks}) == 1
    assert len({look.linestyle for look in looks}) == len({look.marker for look in looks}) == 3
    figure = dose_figure(sweep_data(summary(arms=(plain, replay, control))))
    marks = [{line.get_marker() for line in axes.lines} for axes in figure.axes]
    assert [looks[2].marker in found for found in marks] == [True, False, True, False]
    assert "without mismatch has no place" in figure.get_suptitle()
    assert [any("1 of 4 lost" in text for text in _texts(axes)) for axes in figure.axes[2:]] == [True, False]


def test_precisions_alone_are_not_called_stress() -> None:
    assert "stress" not in dose_figure(sweep_data(summary(arms=ARMS[:1]))).get_suptitle()


def test_a_placed_model_is_a_line_at_its_prediction() -> None:
    figure = dose_figure(sweep_data(summary(places=(PLACE,))))
    lines = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0.42, 0.42]]
    assert len(lines) == 1
    assert PLACE.label in _texts(figure.axes[0])


def test_curves_are_running_means_over_seeds() -> None:
    table = pd.concat([steps([float(s)] * 6).assign(arm="bf16", seed=s) for s in (0, 1)])
    figure = curves_figure(sweep_data(summary(arms=ARMS[:1]), table))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 0.5)


def test_equal_ess_draws_a_row_a_pair() -> None:
    response = matched()
    axes = equal_ess_figure(sweep_data(summary(dose_response=response))).axes[0]
    assert len(axes.get_yticklabels()) == len(response.matched) == 3
    assert axes.lines[0].get_xdata()[0] == response.matched[0].comparison.difference.value
    assert len(axes.collections) == 3


def test_figures_are_drawn_where_data_serve_and_alike_each_time(tmp_path: Path) -> None:
    nothing = sweep_data(summary(arms=(arm(ess=None),)), pd.DataFrame())
    assert figures_of(nothing) == []
    data = sweep_data(summary())
    first, second = (draw(data, tmp_path / name) for name in ("a", "b"))
    assert list(first) == ["dose", "curves"]
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)
