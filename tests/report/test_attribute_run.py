"""A run that has been attributed: its report takes the attribution in, and a damaged one is said."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mismatch_probe.errors import TableError
from mismatch_probe.files import write_json
from mismatch_probe.probes.session import report_run
from tests.report.attribute_documents import attribution

if TYPE_CHECKING:
    from pathlib import Path

    from mismatch_probe.probes.session import RunResult


def test_the_report_of_a_run_takes_its_attribution_in(run_copy: Path) -> None:
    write_json(run_copy / "attribute" / "attribution.json", attribution())
    found = report_run(run_copy, (), None, None)
    drawn = {name: path for name, path in found.figures.items() if name.startswith("attribute-")}
    assert {path.parent for path in drawn.values()} == {run_copy / "attribute" / "figures"}
    assert sorted(path.stem for path in drawn.values()) == ["fixes", "knobs", "ladder", "layers", "lens"]
    assert "Where it comes from" in (run_copy / "report.html").read_text(encoding="utf-8")
    assert "(attribute/figures/ladder.png)" in (run_copy / "report.md").read_text(encoding="utf-8")
    assert "attribution" not in json.loads((run_copy / "summary.json").read_text(encoding="utf-8"))


def test_a_run_without_one_gets_no_folder(finished: RunResult) -> None:
    assert not (finished.path / "attribute").exists()
    assert not any(name.startswith("attribute-") for name in finished.figures)
    assert finished.data.attribution is None


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 1, "gap": {}}'])
@pytest.mark.usefixtures("no_figures")
def test_a_damaged_one_is_an_error_that_says_what_to_do(text: str, run_copy: Path) -> None:
    path = run_copy / "attribute" / "attribution.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError, match=r"attribution\.json") as caught:
        report_run(run_copy, (), None, None)
    assert caught.value.fix == f"Run `mismatch-probe attribute --from {run_copy}` again."
