"""What commands of `rl` have in common: a run goes on with its model, where it began, while something is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.errors import Interrupted, TableError, UsageError
from mismatch_probe.probes.session import Session
from mismatch_probe.results.rl_run import Provenance
from mismatch_probe.rl.config import RlConfig, SanityConfig
from mismatch_probe.rl.plan import make_runs
from mismatch_probe.rl.records import RlDirectory, SweepDirectory
from mismatch_probe.rl.sanity.records import SanityDirectory
from mismatch_probe.runs.folder import RunFolder
from tests.factories.rl_run import PROVENANCE, ending, step

KINDS: dict[str, tuple[Callable[[Path, Provenance], RunFolder[Any]], Callable[[Path], Any]]] = {
    "rl run": (lambda path, origin: RlDirectory.create(path, RlConfig(steps=1), origin), mismatch_probe.rl_resume),
    "rl sweep": (
        lambda path, origin: SweepDirectory.create(path, make_runs({"steps": 1}, [{}]), origin),
        mismatch_probe.rl_sweep_resume,
    ),
    "rl sanity-set": (
        lambda path, origin: SanityDirectory.create(path, SanityConfig(), origin),
        mismatch_probe.rl_sanity_set_resume,
    ),
}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("an engine starts")

    for module in ("run", "sweep", "sanity.run"):
        monkeypatch.setattr(f"mismatch_probe.rl.{module}.EngineProcess", start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_its_model_alone(kind: str, tmp_path: Path) -> None:
    make, resume = KINDS[kind]
    make(tmp_path / "run", PROVENANCE)
    with pytest.raises(TableError, match="The model's files have changed since this run began"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_where_it_began(kind: str, tmp_path: Path) -> None:
    make, resume = KINDS[kind]
    make(tmp_path / "run", PROVENANCE.model_copy(update={"device": "tpu"}))
    with pytest.raises(UsageError, match="This run began on tpu, and this machine offers"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_names_the_command_that_continues(kind: str, tmp_path: Path) -> None:
    run = KINDS[kind][0](tmp_path / "run", PROVENANCE)
    with Session.resume(type(run), run.path, None) as session:
        assert not session.complete
        with pytest.raises(Interrupted) as stopped, session.stoppable("something is kept"):
            raise KeyboardInterrupt
    assert stopped.value.fix == f"Continue with: mismatch-probe {kind} --resume {run.path}"


def test_a_sweep_that_has_ended_is_only_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})
    sweep = SweepDirectory.create(tmp_path / "sweep", make_runs({"steps": 1}, [{}]), PROVENANCE)
    folder = sweep.folder_of(sweep.runs[0])
    folder.append_step(step(0))
    folder.finish(ending("", steps=1))
    assert sweep.complete
    assert mismatch_probe.rl_sweep_resume(sweep.path).exit_code == 0
