"""`mismatch-probe explain`: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.results.explanation import Explanation
from tests.frozen import FROZEN

TRL = (
    "{'loss': 0.0123, 'grad_norm': 0.45, 'completions/mean_length': 212.5, 'reward': 0.4375, "
    "'sampling/sampling_logp_difference/mean': 0.0123, 'sampling/sampling_logp_difference/max': 1.87, "
    "'sampling/importance_sampling_ratio/min': 0.31, 'sampling/importance_sampling_ratio/mean': 0.998, "
    "'sampling/importance_sampling_ratio/max': 2.0, 'entropy': 0.312, 'epoch': 0.02}\n"
)


@pytest.fixture
def pasted(tmp_path: Path) -> Path:
    (tmp_path / "pasted.txt").write_text(TRL)
    return tmp_path / "pasted.txt"


def test_a_pasted_dict_fits_a_screen(
    pasted: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = command("explain", pasted)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert len(lines) <= 50
    assert "No published limit is exceeded." in lines[1]
    assert "sampling/sampling_logp_difference/mean" in shown.out
    assert "compare --from DIR --trust-pickle" in shown.out


def test_standard_input(pasted: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TRL.encode())))
    shown = command("explain", "-", "--json")
    document = json.loads(shown.out)
    assert (shown.code, document["source"], document["frameworks"]) == (0, "standard input", ["TRL"])
    assert Explanation.model_validate(document).series[0].key == "mean_abs_logprob_diff"


def test_written_pages(pasted: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    assert command("explain", pasted, "--out", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"explanation.json", "report.html", "report.md"}
    assert Explanation.read(tmp_path / "out" / "explanation.json").frameworks == ("TRL",)


def test_an_audit_and_its_pair(pasted: Path, command: Callable[..., Any]) -> None:
    audit = FROZEN / "audit" / "audit"
    document = json.loads(command("explain", pasted, "--audit", audit, "--pair", "fp16/fp16", "--json").out)
    assert document["audit"]["predictions"][0]["key"] == "mean_abs_logprob_diff"
    assert command("explain", pasted, "--audit", audit, "--pair", "bf16/bf16").code == 2
    assert command("explain", pasted, "--audit", pasted.parent / "none").code == 1


@pytest.mark.parametrize("content", [b"", b"words alone\n", b"\0\1\2binary", b"PK\x03\x04", b"{'loss': 0.1}\n"])
def test_a_file_without_metrics(content: bytes, tmp_path: Path, command: Callable[..., Any]) -> None:
    (tmp_path / "file").write_bytes(content)
    shown = command("explain", tmp_path / "file")
    assert (shown.code, shown.out) == (1, "")
    assert shown.err.startswith("Error: ")
    assert "Traceback" not in shown.err


def test_a_file_that_is_not_there(tmp_path: Path, command: Callable[..., Any]) -> None:
    shown = command("explain", tmp_path / "none")
    assert shown.code == 1
    assert "does not exist" in shown.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(pasted: Path, command: Callable[..., Any]) -> None:
    pasted.chmod(0)
    assert command("explain", pasted).code == 1


def test_names_of_a_file_are_escaped(tmp_path: Path, command: Callable[..., Any]) -> None:
    line = {"gen_kl_error": 1e-4, "gen_kl_errer\x1b[31m<script>alert(1)</script>[bold]": 1.0}
    (tmp_path / "<b>.jsonl").write_text(json.dumps(line))
    shown = command("explain", tmp_path / "<b>.jsonl", "--out", tmp_path / "out")
    assert shown.code == 0
    assert "\x1b[31m" not in shown.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>.jsonl" not in page
