"""`mismatch-probe audit` as a user calls it, on finished runs of the scripted engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})


def test_a_finished_run_is_judged_and_its_code_is_the_verdicts(command: Command, run_copy: Path) -> None:
    (run_copy.parent / "lax.toml").write_text("[checks.kl_k3]\nfail_above = 1e9\n")
    lax = str(run_copy.parent / "lax.toml")
    passed = command("audit", "--from", run_copy, "--profile", lax)
    assert passed.code == 0
    assert "report.html" in passed.err
    (run_copy.parent / "harsh.toml").write_text("[checks.kl_k3]\nfail_above = 0.0\n")
    assert command("audit", "--from", run_copy, "--profile", str(run_copy.parent / "harsh.toml")).code == 3
    assert command("audit", "--from", run_copy, "--profile", lax, "--pair", "fp16/bf16").code == 0
    (run_copy.parent / "warns.toml").write_text("[checks.kl_k3]\nwarn_above = 0.0\n")
    warns = str(run_copy.parent / "warns.toml")
    assert command("audit", "--from", run_copy, "--profile", warns).code == 0
    assert command("audit", "--from", run_copy, "--profile", warns, "--strict").code == 3


def test_json_is_the_document_and_nothing_else(command: Command, run_copy: Path) -> None:
    outcome = command("audit", "--from", run_copy, "--json")
    assert json.loads(outcome.out) == json.loads((run_copy / "audit" / "audit.json").read_text())


def test_a_baseline_that_is_met(command: Command, run_copy: Path) -> None:
    (run_copy.parent / "lax.toml").write_text("[checks.kl_k3]\nfail_above = 1e9\n")
    arguments = ("audit", "--from", run_copy, "--profile", str(run_copy.parent / "lax.toml"))
    assert command(*arguments).code == 0
    (run_copy.parent / "old.json").write_bytes((run_copy / "audit" / "audit.json").read_bytes())
    assert command(*arguments, "--baseline", run_copy.parent / "old.json").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "RUN", "--resume", "RUN"), "--from and --resume cannot be combined"),
        (("--from", "RUN", "--num-prompts", "4"), "cannot be combined with --from or --resume"),
        (("--from", "RUN", "--out", "x"), "cannot be combined with --from or --resume"),
        (("--from", "RUN", "--profile", "lenient"), "There is no profile 'lenient'"),
        (("--from", "RUN", "--pair", "bf16/int8"), "is not rollout/trainer"),
        (("--from", "RUN", "--planned-tokens", "0"), "--planned-tokens must be above 0"),
    ],
)
def test_what_cannot_be_is_a_usage_error(
    command: Command, run_copy: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = command("audit", *(str(run_copy) if a == "RUN" else a for a in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_folder_without_a_run_and_a_missing_baseline(command: Command, run_copy: Path, tmp_path: Path) -> None:
    outcome = command("audit", "--from", tmp_path / "none")
    assert outcome.code == 1
    assert "none does not exist" in outcome.err
    (tmp_path / "empty").mkdir()
    outcome = command("audit", "--from", tmp_path / "empty")
    assert (outcome.code, "has no file of a kind that can be read" in outcome.err) == (1, True)
    outcome = command("audit", "--from", run_copy, "--baseline", tmp_path / "none.json")
    assert outcome.code == 1
    assert "none.json does not exist" in outcome.err
