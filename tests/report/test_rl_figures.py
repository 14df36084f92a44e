"""Figures and page of RL runs: what is drawn is what was given, and hostile names do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from mismatch_probe.metrics.arms import compare_sweep
from mismatch_probe.metrics.runs import Arm, Run
from mismatch_probe.report.figures import save
from mismatch_probe.report.figures.rl import curves_figure, dose_figure, equal_ess_figure
from mismatch_probe.report.rl_data import ArmPoint, Place
from mismatch_probe.report.rl_page import GUIDES, arms_table, print_arms, render_sweep
from mismatch_probe.types import MetricValue
from tests.report.conftest import HOSTILE


def steps(n: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {
        name: rng.random(n) + 0.1
        for name in (
            "reward",
            "mean_abs_logprob_diff",
            "movement_mean_abs",
            "ess_seq",
            "ess_token",
            "entropy",
            "grad_norm",
            "seconds_rollout",
            "seconds_sync",
            "seconds_forward_backward",
            "seconds_other",
        )
    }
    clean = np.full(n, np.nan)
    clean[-1] = 0.7
    return pd.DataFrame({"step": range(n), **columns, "staleness_mean_abs": 0.0, "clean_reward": clean})


def arm(
    name: str = "a",
    *,
    precision: str = "float32",
    structure: str = "none",
    dose: float = 0.0,
    ess: float | None = 0.5,
    reward: float | None = 0.8,
    collapsed: int = 0,
) -> ArmPoint:
    def value(x: float | None) -> MetricValue:
        return MetricValue(None, why="none") if x is None else MetricValue(x, x - 0.05, x + 0.05)

    return ArmPoint(
        arm=name,
        label=name.upper(),
        family="FAMILY",
        precision=precision if structure == "none" else "",
        structure=structure,
        dose=dose,
        n_runs=4,
        n_collapsed=collapsed,
        n_diverged=0,
        ess_seq=value(ess),
        mean_abs=MetricValue(0.01),
        reward=value(reward),
        clean_reward=value(0.9),
        reward_kept=value(0.95),
    )


ARMS = [
    arm("bf16", precision="bfloat16", ess=0.9),
    arm("noise2", structure="weight-noise", dose=0.2, ess=0.3, reward=0.4, collapsed=2),
    arm("noise1", structure="weight-noise", dose=0.1, ess=0.6, reward=0.7),
    arm("mantissa", structure="mantissa", dose=3, ess=0.61, reward=0.75),
    arm("nowhere", ess=None),
]


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_dose_figure_places_every_arm_where_it_was_measured() -> None:
    figure = dose_figure(ARMS)
    reward = figure.axes[0]
    filled = [line for line in reward.lines if line.get_marker() not in ("None", None) and len(line.get_xdata()) == 1]
    places = {(round(float(line.get_xdata()[0]), 3), round(float(line.get_ydata()[0]), 3)) for line in filled}
    assert {(0.9, 0.8), (0.3, 0.4), (0.6, 0.7), (0.61, 0.75)} <= places
    assert (0.9, 0.9) in places  # the clean weights, hollow
    path = next(line for line in reward.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 0.6)
    assert path.get_xdata().tolist() == [0.6, 0.3]  # doses in their order
    assert "0.1" in _texts(reward)
    assert any("2 of 4 lost" in text for text in _texts(figure.axes[2]))
    assert "injected stress, not precision" in figure.get_suptitle()
    assert figure.axes[1].get_xscale() == "log" or figure.axes[3].get_xscale() == "log"


def test_precisions_alone_are_not_called_stress() -> None:
    assert "stress" not in dose_figure(ARMS[:1]).get_suptitle()


def test_a_placed_model_is_a_line_at_its_prediction() -> None:
    place = Place(
        "mine, BF16, 2,048 tokens", "bfloat16", MetricValue(0.3), MetricValue(0.42, 0.3, 0.5), MetricValue(0.04)
    )
    figure = dose_figure(ARMS, [place])
    lines = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0.42, 0.42]]
    assert len(lines) == 1
    assert "mine, BF16, 2,048 tokens" in _texts(figure.axes[0])


def test_nothing_placed_says_so() -> None:
    assert "No run has gone far enough" in _texts(dose_figure([arm(ess=None)]).axes[0])[0]


def test_curves_are_running_means_over_seeds() -> None:
    table = pd.concat([steps(6).assign(arm="bf16", seed=s, reward=float(s)) for s in (0, 1)])
    figure = curves_figure(table, ARMS[:1])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 0.5)


def test_equal_ess_draws_a_row_a_pair() -> None:
    def runs(name: str, *rewards: float) -> Arm:
        return Arm(name, tuple(Run(seed, reward, False) for seed, reward in enumerate(rewards)))

    first, second, other = runs("A", 0.5, 0.7), runs("B", 0.4, 0.5), Arm("C", (Run(9, 0.5, False),))
    pairs = compare_sweep([(first, second), (first, other)])
    axes = equal_ess_figure(pairs).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A\nminus B"]  # C shares no seed
    assert axes.lines[0].get_xdata()[0] == pytest.approx(0.15)
    assert len(axes.collections) == 1
    assert "No pair" in _texts(equal_ess_figure([]).axes[0])[0]


def _summary() -> dict[str, Any]:
    return {
        "model": {"name": HOSTILE, "revision": None},
        "task": HOSTILE,
        "window": 10,
        "sequences": 64,
        "reading": [HOSTILE, "second"],
        "notes": [HOSTILE],
        "comparisons": [],
        "provenance": {"machine": HOSTILE},
    }


def test_a_page_is_whole_and_hostile_text_does_nothing(tmp_path: Path) -> None:
    figures = {"dose": save(dose_figure(ARMS), tmp_path / "dose.png")}
    place = Place(HOSTILE, "bfloat16", MetricValue(0.3), MetricValue(0.4), MetricValue(0.1))
    page = render_sweep(_summary(), [*ARMS, arm(HOSTILE)], [place], figures)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "default-src &#39;none&#39;" in page
    assert page.count("data:image/png") == 1
    assert page.count("injected stress, not precision") == 3


@pytest.mark.parametrize("name", GUIDES)
def test_every_figure_has_a_guide(name: str) -> None:
    title, guide = GUIDES[name]
    assert title
    assert guide.endswith(".")


def test_the_table_has_every_arm_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(arms_table(ARMS).rows) == len(ARMS)
    print_arms(ARMS, Console(width=80))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "MANTISSA" in printed


def test_equal_data_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = (save(dose_figure(ARMS), tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
