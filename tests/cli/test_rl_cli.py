"""`mismatch-probe rl`: help, usage errors, and what reaches the configuration. No run is started."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.errors import DiskFull
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.run import RlResult
from tests.conftest import Outcome
from tests.factories.rl_run import ending, run_data, steps

Command = Callable[..., Outcome]


def ended(cause: str = "", **settings: Any) -> RlResult:
    """Stands for a run that has ended."""
    return RlResult(Path("runs/here"), run_data(steps([0.5] * 3), ending(cause, steps=3), **settings), {})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `rl_run` and `rl_resume` were called with, in place of a run."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        mismatch_probe, "rl_run", lambda out, progress, **settings: calls.append((settings, out)) or ended()
    )
    monkeypatch.setattr(
        mismatch_probe, "rl_resume", lambda path, progress: calls.append((path,)) or ended("rl-collapsed")
    )
    return calls


@pytest.mark.parametrize("words", [["rl"], ["rl", "run"]])
def test_help_shows_an_example_and_imports_nothing_heavy(command: Command, words: list[str]) -> None:
    found = command(*words, "-h")
    assert (found.code, found.err) == (0, "")
    assert re.search(r"Examples?:\s+mismatch-probe rl run", found.out)
    code = (
        "import sys\nfrom mismatch_probe.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words, "-h"], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert not loaded & {"torch", "transformers", "vllm", "pandas", "pyarrow", "matplotlib", "scipy"}


def test_run_is_listed_and_other_words_are_refused(command: Command) -> None:
    assert re.search(r"^  run ", command("rl", "-h").out, re.MULTILINE)
    assert re.search(r"^  rl ", command("-h").out, re.MULTILINE)
    assert command("rl", "jog").code == 2


def test_check_prints_the_configuration_and_runs_nothing(command: Command, started: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\nsteps = 5\nmodel = "tiny"\n')
    found = command(
        *("rl", "run", "--config", path, "--steps", "7", "--trainer-dtype", "fp16", "--max-tokens", "32", "--check")
    )
    assert (found.code, found.err) == (0, "")
    expected = {"seed": 3, "steps": 7, "model": "tiny", "trainer_dtype": "float16", "max_tokens": 32}
    assert json.loads(found.out) == {**RlConfig().model_dump(), **expected}
    assert started == []


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--max-tokens", "128"], "max_tokens", 128),
        (["--temperature", "0.5"], "temperature", 0.5),
        (["--no-check-sync"], "check_sync", False),
        (["--schedule", "cosine"], "schedule", "cosine"),
        (["--rollout-dtype", "bf16"], "rollout_dtype", "bfloat16"),
        (["--revision", "a=b"], "revision", "a=b"),
        (["--model", "path/with # mark"], "model", "path/with # mark"),
    ],
)
def test_any_key_is_an_option(command: Command, words: list[str], key: str, value: Any) -> None:
    found = command("rl", "run", *words, "--check")
    assert found.code == 0, found.err
    assert json.loads(found.out)[key] == value


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "inf"], "--temperature must be a finite number"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--steps", "many"], "--steps must be a whole number"),
        (["--algorithm", "ppo"], "--algorithm does not accept 'ppo'"),
        (["--rollout-dtype", "float64"], "--rollout-dtype does not accept 'float64'"),
        (["--stress", "stale"], "--stress and --dose need each other"),
        (["--dose", "nan"], "--dose must be a finite number"),
        (["--task", "sums"], "--task does not accept 'sums'"),
        (["--task", "math"], "--task math needs --problems"),
        (["--config", "none.toml"], "The configuration none.toml cannot be read"),
        (["--resume", "there", "--steps", "3"], "cannot be combined with --resume"),
        (["--resume", "there", "--out", "here"], "cannot be combined with --resume"),
        (["--resume", "there", "--config", "c.toml"], "The configuration c.toml cannot be read"),
        (["--resume", "there", "--check"], "cannot be combined with --resume"),
    ],
)
def test_what_cannot_be_is_a_usage_error(command: Command, started: list[Any], arguments: list[str], said: str) -> None:
    found = command("rl", "run", *arguments)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err
    assert found.out == ""
    assert started == []


def test_a_folder_of_something_else_is_refused(command: Command, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        found = command("rl", "run", "--resume", path)
        assert found.code == 1
        assert "holds no RL run" in found.err
        assert "Traceback" not in found.err
    assert not (tmp_path / "none").exists()


def test_a_run_is_started_as_asked(command: Command, started: list[Any]) -> None:
    found = command("rl", "run", "--stress", "mantissa", "--dose", "5", "--seed", "2", "--out", "here")
    assert found.code == 0
    ((settings, out),) = started
    assert (settings, out) == ({"stress": "mantissa", "dose": 5.0, "seed": 2}, "here")
    assert "The run completed 3 steps" in found.out
    assert "runs/here/report.html" in found.out
    assert "\x1b" not in found.out


def test_a_collapse_is_exit_code_3(command: Command, started: list[Any]) -> None:
    found = command("rl", "run", "--resume", "there", "--json")
    assert found.code == 3
    assert json.loads(found.out) == {"path": "runs/here", **ended("rl-collapsed").document.content()}
    assert started == [("there",)]


def test_an_error_of_the_run_is_said(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise DiskFull("The disk is full.", "Free some space.")

    monkeypatch.setattr(mismatch_probe, "rl_run", full)
    found = command("rl", "run")
    assert (found.code, found.out) == (1, "")
    assert found.err.endswith("Error: The disk is full.\n  Free some space.\n")
