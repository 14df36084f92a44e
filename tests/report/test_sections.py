"""Sections of a sentence and a table, and the figure of training steps."""

from __future__ import annotations

from typing import Any

import pytest

from mismatch_probe.report.figures.steps import has_steps, steps_figure
from mismatch_probe.report.sections import sections


def value(x: float | None, why: str = "") -> dict[str, Any]:
    limits = (None, None) if x is None else (0.9 * x, 1.1 * x)
    return {"value": x, "ci_low": limits[0], "ci_high": limits[1], **({"why": why} if why else {})}


def prediction(length: int, ess: float | None) -> dict[str, Any]:
    shares = {key: value(None if ess is None else 1 - ess) for key in ("frac_seq_outside_2", "frac_seq_outside_3")}
    why = "" if ess is not None else "more than 8 times the observed length\x1b[31m"
    return {"length": length, "ess_seq": value(ess, why), **shares, "kl_seq": value(None if ess is None else 0.5)}


def step(number: int, mean: float) -> dict[str, Any]:
    keys = ("mean_abs_logprob_diff", "kl_k3", "ess_seq")
    return {"step": number, "n_tokens": 1000, "metrics": {key: value(mean) for key in keys}}


def recorded(steps: list[dict[str, Any]]) -> dict[str, Any]:
    pair = {"rollout_dtype": "recorded", "trainer_dtype": "recorded", "trainer_mode": "recorded", "steps": steps}
    return {"pairs": [pair]}


def test_old_summaries_have_none() -> None:
    assert sections({}) == []
    assert sections({"pairs": [{"rollout_dtype": "bfloat16", "trainer_dtype": "bfloat16"}], "length": {}}) == []


def test_predictions_are_rows_with_their_bands() -> None:
    summary = {"length": {"float16": {"predictions": [prediction(512, 0.75), prediction(1_000_000, None)]}}}
    (section,) = sections(summary)
    first, second = section.table.rows
    assert first[:3] == ("float16", "512", "75.0 %\n[67.5 %, 82.5 %]")
    assert first[5] == "0.500\n[0.450, 0.550]"
    assert second[1].startswith("1,000,000\nmore than 8 times the observed length")
    assert "\x1b" not in second[1]
    assert second[2] == "–"


def test_steps_are_rows() -> None:
    (section,) = sections(recorded([step(0, 0.01), step(10, 0.02)]))
    assert [row[1] for row in section.table.rows] == ["0", "10"]
    assert section.table.rows[1][3].startswith("2.00e-2")


def test_the_steps_figure_shows_every_step_and_its_band() -> None:
    summary = recorded([step(s, 0.01 * (s + 1)) for s in range(5)])
    assert has_steps(summary)
    figure = steps_figure(summary)
    for axes in figure.axes[:3]:
        (line,) = axes.lines
        assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
        assert list(line.get_ydata()) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
        assert len(axes.collections) == 1
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[2].get_yscale() == "linear"


def test_one_step_is_no_course_and_missing_values_are_said() -> None:
    assert not has_steps(recorded([step(0, 0.01)]))
    steps = [{"step": s, "n_tokens": 0, "metrics": {}} for s in range(2)]
    assert "no values" in [text.get_text() for text in steps_figure(recorded(steps)).axes[0].texts]
