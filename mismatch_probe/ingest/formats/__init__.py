"""Formats of frameworks: each translates a record of its framework into rows of the generic format.

A module of this package that registers a format is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.containers import DumpFile
from mismatch_probe.registered import Registry

GENERIC = "generic"
Rows = Callable[[Record], Iterator[Row]]
Records = Callable[[DumpFile], Iterator[Record]]


@dataclass(frozen=True)
class Format:
    """A layout that a framework writes.

    Attributes:
        name: What `--format` calls it.
        project: The framework.
        version: The release or the date of the sources that it was read from.
        containers: Names of the containers that it comes in.
        layouts: Sets of keys, of which every record of it has one; of formats that fit, the one with the largest set is
            meant.
        rows: Translates a record; it may have several rows, or none.
        records: Reads a file in place of its container, for what is spread over tables or files.
        beside: Patterns of files, as `fnmatch` takes them, that lie beside those with sequences and are not read.
        marker: A pattern of files, and the name of the file that their writer puts beside them when they are complete;
            of a folder's files, those without it are left out. Empty where there is none.
        switch: What to switch on in the framework so that it writes this, and how.
        sides: What of rollout and trainer it holds.
        refusal: Why nothing can be read from it; empty where something can.
    """

    name: str
    project: str
    version: str
    containers: tuple[str, ...]
    layouts: tuple[frozenset[str], ...]
    rows: Rows
    records: Records | None = None
    beside: tuple[str, ...] = ()
    marker: tuple[str, str] = ("", "")
    switch: str = ""
    sides: str = ""
    refusal: str = ""

    @property
    def written_for(self) -> str:
        """Project and version."""
        return f"{self.project} {self.version}".strip()

    def fit(self, fields: Mapping[str, object]) -> int:
        """How many of its keys tell that a record is of this format; 0 where it is of another."""
        return max((len(keys) for keys in self.layouts if keys <= fields.keys()), default=0)

    def lies_beside(self, path: Path) -> bool:
        """Whether a file is one of those that lie beside its sequences."""
        return any(fnmatch(path.as_posix(), f"*{pattern}") for pattern in self.beside)

    def unfinished(self, path: Path) -> bool:
        """Whether a file's writer has not said that it is complete."""
        pattern, name = self.marker
        return bool(pattern) and fnmatch(path.as_posix(), f"*{pattern}") and not (path.parent / name).exists()


_REGISTRY = Registry[Format](__name__, "format")


def dump_format(
    name: str,
    *,
    project: str,
    version: str,
    containers: tuple[str, ...],
    layouts: tuple[tuple[str, ...], ...],
    records: Records | None = None,
    beside: tuple[str, ...] = (),
    marker: tuple[str, str] = ("", ""),
    switch: str = "",
    sides: str = "",
    refusal: str = "",
) -> Callable[[Rows], Rows]:
    """Registers a format; the arguments are attributes of `Format`.

    Raises:
        ValueError: The name is taken.
    """

    def register(rows: Rows) -> Rows:
        sets = tuple(map(frozenset, layouts))
        _REGISTRY.add(
            name,
            Format(name, project, version, containers, sets, rows, records, beside, marker, switch, sides, refusal),
        )
        return rows

    return register


def formats() -> dict[str, Format]:
    """Every registered format by name."""
    return _REGISTRY.sorted()
