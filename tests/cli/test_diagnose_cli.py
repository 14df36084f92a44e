"""`mismatch-probe diagnose`: its exit codes, what it writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mismatch_probe.results.diagnosis import Diagnosis
from tests.probes.toy_dump import Toy, moved, toy


def dump(one: Toy, path: Path, *, sides: tuple[str, ...] = ("rollout", "trainer")) -> Path:
    """A toy in the generic format."""
    evidence = one.evidence()
    logprobs = {"rollout": evidence.rollout, "trainer": evidence.trainer}
    with path.open("w") as file:
        for sequence in range(one.n_sequences):
            where = np.flatnonzero(one.sequence == sequence)
            row: dict[str, object] = {
                "prompt_token_ids": [1000 + sequence],
                "response_token_ids": one.ids[where].tolist(),
                **{f"{side}_logprobs": logprobs[side][where].tolist() for side in sides},
            }
            file.write(json.dumps(row) + "\n")
    return path


def shifted() -> Toy:
    one = toy()
    one.rollout_logprobs = np.roll(one.chosen(one.engine), 1)
    return one


def test_a_fault_exits_with_3_and_names_itself(tmp_path: Path, command: Callable[..., Any]) -> None:
    shown = command("diagnose", dump(shifted(), tmp_path / "d.jsonl"), "--out", tmp_path / "out", "--json")
    assert shown.code == 3
    document = Diagnosis.model_validate(json.loads(shown.out))
    assert (document.outcome, document.classes[0].name) == ("fault", "shift")
    assert document.classes[0].tokens[0].place.startswith(str(tmp_path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"diagnosis.json", "report.html", "report.md"}
    assert Diagnosis.read(tmp_path / "out" / "diagnosis.json") == document


def test_rounding_exits_with_0(tmp_path: Path, command: Callable[..., Any]) -> None:
    shown = command("diagnose", dump(toy(), tmp_path / "d.jsonl"))
    assert shown.code == 0
    assert "No fault" in shown.out


@pytest.mark.parametrize(("more", "code"), [((), 0), (("--strict",), 3)])
def test_what_cannot_be_told_is_a_fault_only_when_strict(
    tmp_path: Path, command: Callable[..., Any], more: tuple[str, ...], code: int
) -> None:
    shown = command("diagnose", dump(moved(toy(), 0.3), tmp_path / "d.jsonl"), *more)
    assert shown.code == code
    assert "Cannot tell" in shown.out


def test_the_folder_of_ingest_is_taken(tmp_path: Path, command: Callable[..., Any]) -> None:
    path = dump(shifted(), tmp_path / "d.jsonl")
    assert command("ingest", path, "--out", tmp_path / "in").code == 0
    path.unlink()
    assert command("diagnose", tmp_path / "in").code == 3


def test_one_side_alone_is_refused(tmp_path: Path, command: Callable[..., Any]) -> None:
    shown = command("diagnose", dump(toy(), tmp_path / "d.jsonl", sides=("rollout",)))
    assert shown.code == 1
    assert "compare --from" in shown.err


def test_options_of_experiments_need_a_model(tmp_path: Path, command: Callable[..., Any]) -> None:
    shown = command("diagnose", dump(toy(), tmp_path / "d.jsonl"), "--engine-dtype", "bfloat16")
    assert shown.code == 2
    assert "--engine-dtype is for experiments. Name the trainer's weights with --model." in " ".join(shown.err.split())
