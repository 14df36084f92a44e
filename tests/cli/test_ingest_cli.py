"""`mismatch-probe ingest` as a user calls it, and its folder as a source of the other commands."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.results.dump import Dump
from tests.conftest import Outcome
from tests.ingest.rows import Row, row, write_jsonl

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    monkeypatch.chdir(tmp_path)


def renamed(**changes: Any) -> Row:
    """A row whose log-probs have a name of their own."""
    one = row(**changes)
    return {"engine_lp" if key == "rollout_logprobs" else key: value for key, value in one.items()}


def test_it_says_what_is_there_and_what_comes_next(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path, [row(score=1), row(rollout_logprobs=[-1.0], score=1)])
    found = command("ingest", "run.jsonl", "-o", "dump")
    assert found.code == 0
    for part in ("run.jsonl", "generic", "score", "mismatch-probe compare --from dump"):
        assert part in found.out
    assert "Report: dump/report.html" in found.err
    assert Dump.read(tmp_path / "dump" / "recorded.json").recorded.file.n_left_out == 1


def test_json_is_the_document_and_nothing_else(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path, [row()])
    found = command("ingest", "run.jsonl", "--out", "dump", "--json")
    assert json.loads(found.out) == json.loads((tmp_path / "dump" / "recorded.json").read_text())


def test_by_default_it_lies_under_runs(command: Command, tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    write_jsonl(tmp_path / "steps", [row()], "1.jsonl")
    assert command("ingest", "steps").code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("steps-")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["runs", "steps"]


def test_what_it_wrote_is_compared(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path, [row(), row(prompt_token_ids=[1])])
    assert command("ingest", "run.jsonl", "-o", "dump").code == 0
    (tmp_path / "run.jsonl").unlink()
    found = json.loads(command("compare", "--from", "dump", "-o", "run", "--json").out)
    assert [pair["n_tokens"] for pair in found["pairs"]] == [4]
    assert command("audit", "--from", "run", "--json").out.startswith("{")


@pytest.mark.parametrize("source", ["run.jsonl", "steps", "dump"])
def test_an_audit_takes_a_dump_too(command: Command, tmp_path: Path, source: str) -> None:
    write_jsonl(tmp_path, [row()])
    (tmp_path / "steps").mkdir()
    write_jsonl(tmp_path / "steps", [row()])
    command("ingest", "run.jsonl", "-o", "dump")
    found = command("audit", "--from", source, "-o", "audited")
    assert (found.code, "names no model to measure" in found.err) == (2, True)


def test_columns_are_named(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path, [renamed()])
    found = command("ingest", "run.jsonl", "-o", "dump", "--map", "engine_lp=rollout_logprobs", "--json")
    assert json.loads(found.out)["recorded"]["rollout"] is True
    several = "engine_lp=rollout_logprobs,trainer_logprobs=trainer_logprobs_2"
    found = command("ingest", "run.jsonl", "-o", "other", "--map", several, "--json")
    assert {"rollout_logprobs", "trainer_logprobs_2"} <= set(json.loads(found.out)["recorded"]["file"]["keys"])
    found = command("compare", "--from", "run.jsonl", "--map", "engine_lp=rollout_logprobs", "--format", "generic")
    assert found.code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("none.jsonl",), "none.jsonl does not exist"),
        (("run.jsonl", "--map", "rollout_logprobs=engine_lp"), "Write engine_lp=rollout_logprobs"),
        (("run.jsonl", "--map", "other=rollout_logprobs"), "has no other, which --map names"),
        (("run.jsonl", "--map", "engine_lp"), "is not of the form theirs=ours"),
        (("run.jsonl", "--format", "nothing"), "There is no format 'nothing'"),
        (("run.pkl",), "add --trust-pickle"),
    ],
)
def test_what_cannot_be_read(command: Command, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    write_jsonl(tmp_path, [renamed()])
    (tmp_path / "run.pkl").write_bytes(pickle.dumps([1]))
    found = command("ingest", *arguments, "-o", "dump")
    assert (found.code, found.out) == (1, "")
    assert sentence in found.err.replace("\n  ", " ")
    assert "Traceback" not in found.err
    assert not (tmp_path / "dump").exists()


def test_a_folder_that_is_not_empty(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path, [row()])
    assert command("ingest", "run.jsonl", "-o", "dump").code == 0
    found = command("ingest", "run.jsonl", "-o", "dump")
    assert (found.code, "dump is not empty" in found.err) == (2, True)


@pytest.mark.parametrize("option", [("--map", "a=step"), ("--format", "generic"), ("--trust-pickle",)])
def test_options_of_a_dump_need_one(command: Command, option: tuple[str, ...]) -> None:
    found = command("compare", *option)
    assert (found.code, f"{option[0]} needs recorded sequences" in found.err) == (2, True)


def test_its_folder_is_shown_and_listed(command: Command, tmp_path: Path) -> None:
    write_jsonl(tmp_path, [row()])
    command("ingest", "run.jsonl", "-o", "runs/dump")
    found = json.loads(command("show", "runs/dump", "--json").out)
    assert (found["kind"], found["status"], found["missing"]) == ("dump", "complete", [])
    shown = command("show", "runs/dump")
    assert shown.code == 0
    for part in ("dump", "run.jsonl", "recorded.parquet"):
        assert part in shown.out
    assert [one["kind"] for one in json.loads(command("runs", "--json").out)["runs"]] == ["dump"]
    for others in (("report", "runs/dump"), ("attribute", "--from", "runs/dump"), ("compare", "--resume", "runs/dump")):
        outcome = command(*others)
        assert outcome.code == 1
        assert "it is the folder of a dump" in outcome.err


def test_hostile_text_does_not_reach_the_terminal(command: Command, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07<script>alert(1)</script>"
    (tmp_path / "steps").mkdir()
    write_jsonl(tmp_path / "steps", [row(**{evil: 1, "tags": evil, "prompt_id": evil})], "\x1b[31m.jsonl")
    found = command("ingest", "steps", "-o", "dump")
    assert found.code == 0
    assert "\x1b]0" not in found.out + found.err
    assert "\x1b[31m.jsonl" not in found.out + found.err
    assert "<script>alert" not in (tmp_path / "dump" / "report.html").read_text()


def test_a_polite_stop_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys, time; from mismatch_probe.ingest import collect; real = collect.Collector.take\n"
    code += "def take(*a):\n    real(*a); print('begun', file=sys.stderr, flush=True); time.sleep(60)\n"
    code += "collect.Collector.take = take; from mismatch_probe.cli.main import main; main()"
    write_jsonl(tmp_path, [row()])
    for arguments in (("ingest", "run.jsonl"), ("compare", "--from", "run.jsonl")):
        command = [sys.executable, "-c", code, *arguments, "-o", "out"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "begun" in line:
                    break
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert process.returncode == 130
        assert "Traceback" not in said
        assert {one.name for one in tmp_path.iterdir()} == {"run.jsonl"}
