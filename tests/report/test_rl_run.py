"""The report of an RL run."""

from __future__ import annotations

import shlex
from typing import Any

import pandas as pd
import pytest

from mismatch_probe.cli.main import main
from mismatch_probe.report.figures import figures_of
from mismatch_probe.report.figures.rl import run_figure
from mismatch_probe.report.model import Items, Text
from mismatch_probe.report.rl_run import rl_run_report
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.rl_run import RlRun
from tests.factories.rl_run import CAUSES, ending, noisy, run_data, step, steps
from tests.snapshot import assert_snapshots

EXACT = {"rollout_dtype": "float32", "trainer_dtype": "float32"}


def test_the_report_of_a_collapsed_run() -> None:
    rows = pd.DataFrame([step(i, reward=r, gap=1e-3 * 1.1**i) for i, r in enumerate(noisy(0.8, 0.1))])
    assert_snapshots("rl_run", rl_run_report(run_data(rows, ending("rl-collapsed"), stress="weight-noise", dose=0.2)))


@pytest.mark.parametrize("cause", [None, "", *CAUSES])
@pytest.mark.parametrize("rewards", [noisy(0.3, 0.6), noisy(0.6, 0.3), noisy(0.5, 0.5), [0.5], []])
@pytest.mark.parametrize("settings", [{}, EXACT, {"stress": "stale", "dose": 2}, {**EXACT, "record_rollouts": False}])
def test_every_report_has_an_answer_and_a_step_that_is_a_command(
    cause: str | None, rewards: list[float], settings: dict[str, Any]
) -> None:
    ended = None if cause is None else ending(cause, steps=len(rewards))
    report = rl_run_report(run_data(steps(rewards), ended, **settings))
    assert len(report.answer) == 2
    assert report.steps
    assert (report.state == "fail") == bool(cause)
    assert (report.table is None) == (not rewards)
    for one in report.steps:
        words = shlex.split(one.command)
        assert words[0] == "mismatch-probe"
        assert ("rollouts.parquet" in one.command) <= settings.get("record_rollouts", True)
    # FP32 is advised where it is not what failed.
    precise = [one for one in report.steps if "--trainer-dtype fp32" in one.command]
    assert not (precise and EXACT.items() <= settings.items())
    said = [
        *report.answer,
        *(note.text for note in report.notes),
        *(
            item.text
            for part in report.sections
            for block in part.blocks
            if isinstance(block, Items)
            for item in block.items
        ),
    ]
    assert len(said) == len(set(said))
    assert all(isinstance(note, Text) for note in report.notes)


def test_an_earlier_run_is_configuration(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of a report name the run's folder as `--config`."""
    data = run_data(steps(noisy(0.5, 0.5)), ending("rl-collapsed"), algorithm="gspo", seed=4)
    data.run.write(tmp_path / "run.json")
    with pytest.raises(SystemExit) as ended:
        main(["rl", "run", "--config", str(tmp_path), "--trainer-dtype", "fp32", "--check"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert '"algorithm": "gspo"' in shown
    assert '"trainer_dtype": "float32"' in shown


def test_the_document_comes_back_as_it_was_written(tmp_path: Any) -> None:
    data = run_data(steps(noisy(0.3, 0.6)), ending("rl-collapsed"))
    data.run.write(tmp_path / "run.json")
    assert RlRun.read(tmp_path / "run.json") == data.run


def test_every_cause_has_words_with_its_values() -> None:
    for code, values in CAUSES.items():
        words = all_words()[code]
        assert set(values) == set(words.values)
        cause = ending(code).cause
        assert cause is not None
        assert say(cause).endswith(".")


def test_a_run_without_a_step_has_no_figure() -> None:
    assert figures_of(run_data(pd.DataFrame(), None)) == []
    assert [info.name for info in figures_of(run_data(steps([0.5]), None))] == ["run"]


def test_the_figure_draws_every_series() -> None:
    rows = steps(noisy(0.3, 0.6))
    rows["clean_reward"] = [None] * 19 + [0.7]
    rows.loc[3, "mean_abs_logprob_diff"] = None
    reward, gap, ess, *_ = run_figure(run_data(rows, None)).axes
    assert list(reward.lines[0].get_ydata()) == rows["reward"].tolist()
    assert reward.lines[1].get_ydata()[-1] == 0.7
    # What is 0 everywhere has no place on a log scale; a step without tokens leaves a gap.
    assert [line.get_label() for line in gap.lines] == ["mismatch", "policy movement"]
    assert gap.get_yscale() == "log"
    assert pd.isna(gap.lines[0].get_ydata()).tolist() == [i == 3 for i in range(20)]
    assert len(ess.lines) == 2
