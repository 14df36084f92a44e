"""Documents on disk: a frozen file of every schema is read, and whatever else lies there is one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import TableError
from mismatch_probe.results.base import Document
from mismatch_probe.results.comparison import Comparison
from mismatch_probe.results.dump import Dump
from mismatch_probe.results.explanation import Explanation
from mismatch_probe.results.manifest import Manifest
from mismatch_probe.results.preflight import Preflight
from tests.factories.comparison import make_comparison
from tests.frozen import FROZEN

KINDS: dict[str, type[Document]] = {
    "comparison": Comparison,
    "dump": Dump,
    "explanation": Explanation,
    "manifest": Manifest,
    "preflight": Preflight,
}
FILES = sorted((FROZEN / "documents").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_frozen_file_is_read(path: Path) -> None:
    name, version = re.fullmatch(r"(\w+)-(\d+)", path.stem).groups()  # type: ignore[union-attr]
    assert int(version) <= KINDS[name].VERSION
    assert KINDS[name].read(path).schema_version == KINDS[name].VERSION


def test_every_version_that_can_be_read_is_frozen() -> None:
    known = {f"{name}-{n}" for name, kind in KINDS.items() for n in range(kind.OLDEST, kind.VERSION + 1)}
    assert {path.stem for path in FILES} == known


def test_steps_of_an_older_comparison_become_groups(tmp_path: Path) -> None:
    old = json.loads((FROZEN / "documents" / "comparison-2.json").read_text())
    kl = {"value": 0.001, "ci_low": None, "ci_high": None, "why": ""}
    old["pairs"][0]["steps"] = [{"step": n, "n_tokens": 10 + n, "metrics": {"kl_k3": kl}} for n in (0, 30)]
    (tmp_path / "summary.json").write_text(json.dumps(old))
    first, *others = Comparison.read(tmp_path / "summary.json").pairs
    assert [(group.key, group.label, group.n_tokens) for group in first.groups] == [
        ("step", "0", 10),
        ("step", "30", 40),
    ]
    assert first.groups[1].metrics["kl_k3"].value == 0.001
    assert not any(pair.groups for pair in others)


@pytest.mark.parametrize("pairs", [None, 7, [None], [{"steps": 3}], [{"steps": [1]}], [{"steps": [{}]}]])
def test_an_older_comparison_that_is_damaged_names_the_field(tmp_path: Path, pairs: Any) -> None:
    old = json.loads((FROZEN / "documents" / "comparison-2.json").read_text()) | {"pairs": pairs}
    (tmp_path / "summary.json").write_text(json.dumps(old))
    with pytest.raises(TableError, match=r"comparison: pairs"):
        Comparison.read(tmp_path / "summary.json")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    document = make_comparison()
    document.write(tmp_path / "summary.json")
    assert Comparison.read(tmp_path / "summary.json") == document


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"schema_version": 4, "tool_version": "0.9"}, "schema 4; this release reads up to 3", ">=0.9"),
        ({"schema_version": 1}, "schema 1, which was never released", "mismatch-probe report"),
        ({"schema_version": None}, "no schema version", "mismatch-probe report"),
        ({"model": 7}, "comparison: model: input should be a valid string", "mismatch-probe report"),
        ({"pairs": [{}]}, "comparison: pairs.0.rollout_pass: field required", "mismatch-probe report"),
        ({"mine": 1}, "comparison: mine: extra inputs are not permitted", "mismatch-probe report"),
    ],
)
def test_a_wrong_document_is_one_sentence_with_its_field(
    tmp_path: Path, change: dict[str, Any], what: str, fix: str
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(make_comparison().content() | change))
    with pytest.raises(TableError) as error:
        Comparison.read(path)
    assert what in error.value.what
    assert str(path) in error.value.what
    assert fix in error.value.fix


@pytest.mark.parametrize("text", ["", "not json", '{"schema_version": 2, "model": "x', "[1]", "[" * 100_000])
def test_a_damaged_or_foreign_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"summary\.json (cannot be read as JSON|is no comparison)"):
        Comparison.read(path)


def test_a_document_of_another_kind_names_the_first_field_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no valid comparison: \w+: "):
        Comparison.read(FROZEN / "documents" / "manifest-2.json")
    with pytest.raises(TableError, match="does not exist"):
        Comparison.read(tmp_path / "summary.json")
