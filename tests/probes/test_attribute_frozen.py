"""A frozen attribution: its passes give the numbers that they gave when they were frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.results.attribution import Attribution
from tests.rl.test_frozen import FROZEN, assert_equal


@pytest.mark.usefixtures("no_figures")
def test_attribution(tmp_path: Path) -> None:
    """A run of smollm2-135m, with three of its layers."""
    run = Path(shutil.copytree(FROZEN / "attribution", tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["path"] = str(run / "model")
    (run / "manifest.json").write_text(json.dumps(manifest))
    frozen = Attribution.read(run / "attribute" / "attribution.json").content()
    found = mismatch_probe.Run.open(run).attribute(engines=False).attribution.content()
    # What is not measured says why by what is installed.
    for document in (found, frozen):
        document["settings"] = [row for row in document["settings"] if row["status"] == "measured"]
    assert_equal({**found, "tool_version": frozen["tool_version"]}, frozen)
