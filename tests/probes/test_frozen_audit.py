"""A frozen audit: the tables and measurements of a run give the numbers that they gave when they were frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mismatch_probe
from mismatch_probe.results.audit import Audit
from mismatch_probe.runs.measurements import Measurement
from tests.frozen import FROZEN, assert_equal


def test_an_audit_of_smollm2_135m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP16 and FP32, with a few tensors of each measurement."""

    def load(part: Measurement) -> tuple[dict[str, Any], dict[str, Any]]:
        # Keys change with the release.
        with np.load(part.path) as file:
            return json.loads(str(file["about"]))["facts"], {name: file[name] for name in file.files if name != "about"}

    monkeypatch.setattr(Measurement, "load", load)
    monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})
    run = Path(shutil.copytree(FROZEN / "audit", tmp_path / "run"))
    frozen = Audit.read(run / "audit" / "audit.json").content()
    found = mismatch_probe.Run.open(run).audit(engines=False).audit.content()
    assert_equal({**found, "tool_version": frozen["tool_version"]}, frozen)
