"""Measurements beside a run's tables: a file each, whole or not there, that says what it was made of."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.files import atomic_path

Part = tuple[dict[str, Any], dict[str, NDArray[Any]]]
"""Facts and arrays of a measurement, as its file holds them."""
# What zipfile, zlib and numpy raise at bytes that are not theirs.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    SyntaxError,
    NotImplementedError,
    TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Measurement:
    """Where one measurement goes; a job takes it along to another process.

    Attributes:
        path: Its file, `.npz`.
        key: A digest of all that the content depends on.
    """

    path: Path
    key: str

    def beside(self, name: str) -> Measurement:
        """Another file that depends on the same."""
        return replace(self, path=self.path.with_name(f"{name}.npz"))

    def save(self, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes the file, atomically.

        Args:
            facts: What JSON can hold.
            arrays: By name.

        Raises:
            DiskFull: No space is left on the device.
            TableError: Another I/O failure.
        """
        about = json.dumps({"key": self.key, "facts": dict(facts)})
        with atomic_path(self.path) as partial, partial.open("wb") as handle:
            np.savez_compressed(handle, about=np.array(about), **dict(arrays))  # type: ignore[arg-type]

    def load(self) -> Part | None:
        """Facts and arrays; None where there is no file, it is damaged, or it was made of something else."""
        try:
            # Opened here: of a damaged file numpy would leave its own handle open.
            with self.path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                if about["key"] != self.key:
                    return None
                return about["facts"], {name: found[name] for name in found.files if name != "about"}
        except _DAMAGE:
            return None

    def facts(self) -> dict[str, Any] | None:
        """Facts alone, without reading the arrays; None as in `load`."""
        about = _about(self.path)
        return about["facts"] if about is not None and about.get("key") == self.key else None


def failures(folder: Path) -> dict[str, str]:
    """Why measurements in a folder could not be made, by name, whatever they are made of."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        about = _about(path)
        if about is not None and "failed" in about["facts"]:
            found[path.stem] = str(about["facts"]["failed"])
    return found


def _about(path: Path) -> dict[str, Any] | None:
    """Key and facts of a file, without its arrays; None where it is damaged."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            return about if isinstance(about, dict) and isinstance(about.get("facts"), dict) else None
    except _DAMAGE:
        return None


class Store:
    """The measurements of one command in a run's folder.

    Args:
        folder: Where their files are.
        key: By name a digest of all that a measurement depends on.
    """

    def __init__(self, folder: Path, key: Callable[[str], str]) -> None:
        self.folder = folder
        self._key = key
        self._known: dict[str, Measurement] = {}

    def at(self, name: str) -> Measurement:
        """A measurement by its name, which is its file's, too."""
        if name not in self._known:
            self._known[name] = Measurement(self.folder / f"{name}.npz", self._key(name))
        return self._known[name]

    def load(self, names: Iterable[str]) -> dict[str, Part]:
        """Those that are there and were made of this run as it is asked for now."""
        found = {name: self.at(name).load() for name in names}
        return {name: part for name, part in found.items() if part is not None}

    def has(self, name: str) -> bool:
        """Whether a measurement is there."""
        return self.at(name).load() is not None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that are not there."""
        return [name for name in names if not self.has(name)]

    def failed(self, names: Iterable[str]) -> dict[str, str]:
        """Why a measurement could not be made, of those whose last attempt failed."""
        found = {name: self.at(name).facts() or {} for name in names}
        return {name: str(facts["failed"]) for name, facts in found.items() if "failed" in facts}

    def forget(self, names: Iterable[str]) -> None:
        """Removes files, so that the measurements are missing."""
        for name in names:
            self.at(name).path.unlink(missing_ok=True)

    def stale(self, names: Iterable[str]) -> list[str]:
        """Those whose file was made of something else or is damaged."""
        return [name for name in names if self.at(name).path.exists() and not self.has(name)]
