"""`mismatch-probe attribute` as a user calls it, on a finished run of the scripted engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MakeModel, Outcome

Command = Callable[..., Outcome]


def test_a_finished_run_is_taken_apart_as_far_as_it_goes(command: Command, run_copy: Path, no_figures: None) -> None:
    outcome = command("attribute", "--from", run_copy, "--no-layers")
    assert outcome.code == 0
    assert outcome.out.startswith("Where the gap of ")
    assert str(run_copy / "attribute" / "report.html") in outcome.err


def test_json_is_one_document(command: Command, run_copy: Path, no_figures: None) -> None:
    document = json.loads(command("attribute", "--from", run_copy, "--pair", "fp16", "--json").out)
    assert document["rollout_dtype"] == "float16"
    assert document == json.loads((run_copy / "attribute" / "attribution.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "a", "--resume", "b"), "--from and --resume cannot be combined"),
        (("--from", "a", "--model", "m"), "cannot be combined with --from or --resume"),
        (("--resume", "a", "--plan"), "cannot be combined with --from or --resume"),
        (("--pair", "bf16/int4", "--plan"), "is not rollout/trainer"),
        (("--target", "2", "--plan"), "--target must be below 1"),
        (("--trainer-mode", "cast,autocast", "--plan"), "one --trainer-mode"),
        (("--rollout-dtypes", "bf16"), "No such option"),
    ],
)
def test_mistakes_are_sentences(command: Command, arguments: tuple[str, ...], words: str) -> None:
    outcome = command("attribute", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_an_unknown_setting_lists_the_known(command: Command, scripted_model: MakeModel) -> None:
    outcome = command("attribute", "--model", scripted_model(), "--settings", "foo", "--plan")
    assert outcome.code == 2
    assert "does not know 'foo'" in outcome.err
    assert "kv-fp8" in outcome.err


def test_a_plan_lists_processes_and_settings(command: Command, scripted_model: MakeModel) -> None:
    outcome = command("attribute", "--model", scripted_model(), "--plan")
    assert outcome.code == 0
    assert "rollout as it sampled" in outcome.out
    assert "it needs two GPUs" in outcome.out
    document = json.loads(command("attribute", "--model", scripted_model(), "--plan", "--json").out)
    assert document["seconds"] > 0
