"""Frozen runs: their tables give the numbers that they gave when they were frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mismatch_probe
from mismatch_probe.engines.gradient import PassTask
from mismatch_probe.probes.gradient import session
from mismatch_probe.results.gradient import Gradient
from mismatch_probe.results.rl_run import RlRun
from mismatch_probe.results.sanity import SanityOutcome
from mismatch_probe.results.sweep import RlSweep
from mismatch_probe.rl.plan import planned_runs
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.sanity.records import outcome_of
from mismatch_probe.rl.sweep_summary import summarise_sweep, sweep_findings
from tests.frozen import FROZEN, assert_equal


def test_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of smollm2-135m with 24 of its projections' components."""

    def take(run: object, config: object, tasks: list[PassTask], progress: object) -> None:
        for task in tasks:
            with np.load(task.file.path) as file:
                facts = json.loads(str(file["about"]))["facts"]
                arrays = {name: file[name] for name in file.files if name != "about"}
            task.file.save(facts, arrays)

    monkeypatch.setattr(session, "_make_missing", take)
    run = Path(shutil.copytree(FROZEN / "gradient", tmp_path / "run"))
    frozen = Gradient.read(run / "gradient" / "gradient.json").content()
    found = mismatch_probe.Run.open(run).gradient().document.content()
    assert_equal({**found, "tool_version": frozen["tool_version"]}, frozen)


def test_sanity_set() -> None:
    for case in json.loads((FROZEN / "sanity.json").read_text()):
        frozen = SanityOutcome(**case["outcome"])
        lengths, truncated = np.array(case["lengths"]), np.array(case["truncated"], bool)
        found = outcome_of(np.array(case["right"]), frozen.n_samples, frozen.keep, lengths, truncated)
        assert_equal(found.model_dump(mode="json"), frozen.model_dump(mode="json"))


def test_rl_run(tmp_path: Path) -> None:
    """Five steps of the bundled model in BF16."""
    run = Path(shutil.copytree(FROZEN / "rl-run", tmp_path / "run"))
    frozen = RlRun.read(run / "run.json")
    directory = RlDirectory.open(run)
    found = directory.summarise(directory.steps())
    assert_equal(found.content(), frozen.content())


def test_sweep() -> None:
    """Five arms of eight seeds, with made-up steps of which some runs collapse, diverge or are missing."""
    frozen = RlSweep.read(FROZEN / "sweep" / "sweep.json")
    runs = pd.read_parquet(FROZEN / "sweep" / "runs.parquet")
    assert frozen.summary is not None
    found = summarise_sweep(planned_runs(frozen, FROZEN), runs, ())
    assert_equal(found.model_dump(mode="json"), frozen.summary.model_dump(mode="json"))
    assert_equal(
        [one.model_dump(mode="json") for one in sweep_findings(found)],
        [one.model_dump(mode="json") for one in frozen.findings],
    )
