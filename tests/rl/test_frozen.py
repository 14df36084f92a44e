"""Frozen runs: their tables give the numbers that they gave when they were frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mismatch_probe
from mismatch_probe.arrays import save_arrays
from mismatch_probe.results.gradient import Gradient
from mismatch_probe.results.sanity import SanityOutcome
from mismatch_probe.rl import gradient
from mismatch_probe.rl.gradient_task import PassTask
from mismatch_probe.rl.sanity.selection import outcome_of
from tests.frozen import FROZEN, assert_equal


def test_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of smollm2-135m with 24 of its projections' components."""

    def take(run: object, config: object, tasks: list[PassTask], progress: object) -> None:
        for task in tasks:
            with np.load(task.path) as file:
                facts = json.loads(str(file["about"]))["facts"]
                arrays = {name: file[name] for name in file.files if name != "about"}
            save_arrays(Path(task.path), task.key, facts, arrays)

    monkeypatch.setattr(gradient, "_make_missing", take)
    run = Path(shutil.copytree(FROZEN / "gradient", tmp_path / "run"))
    frozen = Gradient.read(run / "gradient" / "gradient.json").content()
    found = mismatch_probe.rl_gradient(run).document.content()
    assert_equal({**found, "tool_version": frozen["tool_version"]}, frozen)


def test_sanity_set() -> None:
    for case in json.loads((FROZEN / "sanity.json").read_text()):
        frozen = SanityOutcome(**case["outcome"])
        lengths, truncated = np.array(case["lengths"]), np.array(case["truncated"], bool)
        found = outcome_of(np.array(case["right"]), frozen.n_samples, frozen.keep, lengths, truncated)
        assert_equal(found.model_dump(mode="json"), frozen.model_dump(mode="json"))
