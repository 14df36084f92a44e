"""Measurements beside a run's tables: a file each, whole or not there, that says what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mismatch_probe.arrays import load_arrays, save_arrays

Part = tuple[dict[str, Any], dict[str, NDArray[Any]]]
"""Facts and arrays of a measurement, as its file holds them."""


@dataclass(frozen=True)
class Measurement:
    """Where one measurement goes; a job takes it along to another process.

    Attributes:
        path: Its file, `.npz`.
        key: A digest of all that the content depends on.
    """

    path: Path
    key: str

    def load(self) -> Part | None:
        """What is there; None where nothing is, it is damaged, or it was made of something else."""
        return load_arrays(self.path, self.key)

    def save(self, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes the file, atomically.

        Raises:
            DiskFull: No space is left on the device.
            TableError: Another I/O failure.
        """
        save_arrays(self.path, self.key, facts, arrays)


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

    def stale(self, names: Iterable[str]) -> list[str]:
        """Those whose file was made of something else or is damaged."""
        return [name for name in names if self.at(name).path.exists() and not self.has(name)]
