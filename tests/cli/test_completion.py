"""Shell completion: scripts, choices, registered names, files and run folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from mismatch_probe.cli.main import cli


def completed(*words: str) -> list[tuple[str, str]]:
    """What completes the last word: type and value."""
    complete = ShellComplete(cli, {}, "mismatch-probe", "_MISMATCH_PROBE_COMPLETE")
    return [(item.type, item.value) for item in complete.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed(shell: str) -> None:
    code = "from mismatch_probe.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"_MISMATCH_PROBE_COMPLETE": f"{shell}_source", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # click asks bash for its version, which need not be installed.
    assert "mismatch-probe" in done.stdout or (shell == "bash" and "bash" in done.stderr.lower())


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("com",), ["compare"]),
        (("compare", "--sequences", ""), ["own", "shared"]),
        (("compare", "--rollout-dtypes", "float16,fl"), ["float16,float16", "float16,float32"]),
        (("rl", "run", "--algorithm", "gs"), ["gspo"]),
        (("audit", "--trainer-l"), ["--trainer-layout"]),
    ],
)
def test_names_complete(words: tuple[str, ...], values: list[str]) -> None:
    assert [value for _, value in completed(*words)] == values


def test_files_and_run_folders_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/ab", "runs/none"):
        Path(name).mkdir(parents=True)
    for name in ("runs/a/manifest.json", "runs/ab/run.json"):
        Path(name).touch()
    assert completed("compare", "--prompts", "x") == [("file", "x")]
    for words in (("report", ""), ("compare", "--resume", ""), ("show", "runs/"), ("attribute", "--from", "runs/a")):
        assert completed(*words) == [("plain", "runs/a"), ("plain", "runs/ab")], words
    assert completed("report", "elsewhere/x") == [("dir", "elsewhere/x")]


def test_every_setting_of_a_choice_completes() -> None:
    for name in ("compare", "attribute", "audit"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for parameter in command.params:
            if parameter.metavar and parameter.metavar.startswith("["):
                assert completed(name, parameter.opts[0], ""), parameter.opts[0]
