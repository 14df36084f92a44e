"""`rl sweep`, `rl demo` and `rl report` as commands: what they print, refuse, and end with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.results.sweep import RlSweep
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.plan import make_runs
from mismatch_probe.rl.records import SweepDirectory
from mismatch_probe.rl.sweep import write_sweep
from tests.factories.rl_run import PROVENANCE, ending, step

Run = Callable[..., Any]
PLAN = '[base]\nsteps = 2\n[[grid]]\nprecision = ["bf16", "fp32"]\nseeds = 2\n'


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of which one arm has ended, and one run of it has collapsed without stress."""
    runs = make_runs({"steps": 3, "pass_window": 2, "collapse_window": 2}, [{"precision": ["bf16"], "seeds": 2}])
    directory = SweepDirectory.create(tmp_path / "sweep", runs, PROVENANCE)
    for planned, cause in zip(directory.runs, ("", "rl-collapsed"), strict=True):
        run = directory.folder_of(planned)
        for i in range(3):
            run.append_step(step(i, ess=1.0))
        run.finish(ending(cause, steps=3, clean_reward=0.6))
    return directory.path


def test_check_prints_the_runs_and_runs_nothing(command: Run, plan: Path) -> None:
    ended = command("rl", "sweep", plan, "--check")
    assert ended.code == 0
    runs = json.loads(ended.out)
    assert [run["config"]["seed"] for run in runs] == [0, 0, 1, 1]
    assert RlConfig.of(runs[0]["config"]).steps == 2
    assert [p.name for p in plan.parent.iterdir()] == ["plan.toml"]


def test_an_earlier_sweep_is_a_plan(command: Run, sweep: Path) -> None:
    """The report's command for more seeds."""
    ended = command("rl", "sweep", sweep, "--seeds", "3", "--check")
    assert ended.code == 0
    planned = json.loads(ended.out)
    assert [run["config"]["seed"] for run in planned] == [0, 1, 2]
    assert {run["config"]["rollout_dtype"] for run in planned} == {"bfloat16"}
    assert all(run["config"]["steps"] == 3 for run in planned)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "x", "--seeds", "3"], "--seeds cannot be combined with --resume"),
        ([], "A sweep needs a PLAN"),
        (["plan.toml", "--resume", "x"], "Give one of them"),
        (["--resume", "x", "--out", "y"], "--out cannot be combined with --resume"),
        (["--resume", "x", "--check"], "--check cannot be combined with --resume"),
        (["none.toml"], "cannot be read"),
    ],
)
def test_what_contradicts_itself_is_refused(command: Run, arguments: list[str], said: str) -> None:
    ended = command("rl", "sweep", *arguments)
    assert ended.code == 2
    assert said in ended.err.replace("\n", " ")


def test_a_collapse_without_stress_is_exit_3(command: Run, sweep: Path) -> None:
    ended = command("rl", "report", sweep)
    assert ended.code == 3
    assert "BF16" in ended.out
    assert "1 of 2 runs without injected stress collapsed" in ended.out
    assert (sweep / "report.html").exists()


def test_json_is_all_that_is_printed(command: Run, sweep: Path) -> None:
    ended = command("rl", "report", sweep, "--json")
    found = json.loads(ended.out)
    assert found.pop("path") == str(sweep)
    document = RlSweep(**found)
    assert document == RlSweep.read(sweep / "sweep.json")
    assert document.summary is not None
    assert document.summary.arms[0].n_collapsed == 1
    assert document.summary.dose_response is None


def test_a_run_of_compare_is_placed(command: Run, sweep: Path, run_copy: Path) -> None:
    ended = command("rl", "report", sweep, "--place", run_copy, "--planned-tokens", "24")
    assert ended.code == 3
    document = RlSweep.read(sweep / "sweep.json")
    assert document.summary is not None
    assert len(document.summary.places) == 3
    assert all("24 tokens" in place.label for place in document.summary.places)
    assert "Placed models" in (sweep / "report.html").read_text()


def test_a_folder_that_is_no_sweep_is_an_error(command: Run, tmp_path: Path) -> None:
    ended = command("rl", "report", tmp_path)
    assert ended.code == 1
    assert "holds no sweep" in ended.err


def test_writing_again_changes_no_byte(sweep: Path) -> None:
    first, second = (
        (write_sweep(SweepDirectory.open(sweep)), (sweep / "report.html").read_bytes())[1] for _ in range(2)
    )
    assert first == second
