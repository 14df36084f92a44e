"""Files that are never half-written, folders that one process at a time may use, and files that are shipped."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mismatch_probe.errors import DiskFull, FolderBusy, TableError, UsageError

LOCK = ".lock"
_PACKAGE = Path(__file__).resolve().parent


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces it on success and vanishes on failure.

    Raises:
        DiskFull: No space is left on the device.
        TableError: Another I/O failure.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it was never made where its folder could not be
            temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields `path`, and says in a user's words why it could not be written.

    Raises:
        DiskFull: No space is left on the device.
        TableError: Another I/O failure.
    """
    try:
        yield path
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk is full: {path.name} could not be written.",
                "Free some space and continue with --resume; finished passes are kept.",
            ) from error
        raise TableError(
            f"{path} cannot be written: {error.strerror or error}.", "Check the folder's permissions."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Writes strict JSON (no NaN, no infinity) atomically."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes, making it where it is missing; the lock dies with the process.

    Raises:
        FolderBusy: Another process holds it.
        UsageError: The folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be used as a run folder ({error.strerror}).", "Choose another folder."
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FolderBusy(f"Another process is using {folder}.", "Wait until it ends, then try again.") from None
    try:
        yield
    finally:
        os.close(handle)  # the file stays: were it removed, two processes could hold locks on two files of its name


def in_use(folder: Path) -> bool:
    """Whether a process holds the folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def data_path(name: str) -> Path:
    """The path of a shipped data file, e.g. `data_path("prompts.jsonl")`.

    A wheel holds the data in `mismatch_probe/data/`; a checkout (and so an editable install) holds it in `data/` beside
    the package.

    Raises:
        FileNotFoundError: No such file is shipped, which is a fault of the package and never of its user.
    """
    candidates = (_PACKAGE / "data" / name, _PACKAGE.parent / "data" / name)
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is neither at {candidates[0]} nor at {candidates[1]}")
