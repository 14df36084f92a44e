"""Metrics that a training run logged, read from what people have: a pasted line, a log, a table, an event file.

A module of this package registers a reader: `@metric_reader(name, sniff)` on a function from an opened file to records.
Text takes what no other reader does. They stream: a record holds what was logged together, and nothing else is kept.
Nothing in a file is evaluated or unpickled.
"""

from __future__ import annotations

import io
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from mismatch_probe.errors import IngestError
from mismatch_probe.registered import Registry

Damage = Literal["line-cut", "json-cut", "record-damaged", "tail-cut", "row-short", "names-left-out"]
HEAD = 1 << 16
LONGEST_LINE = 1 << 20  # characters; of a longer line the rest is left out
LONGEST_NAME = 200
MOST_NAMES = 20_000  # in one record
FORMATS = (
    "a log with TRL's dicts, verl's step lines or other key:value lines, JSON, JSON Lines, CSV, TensorBoard events"
)
_LAST = "text"  # takes every text
_FOUND_IN_FOLDERS = ("metrics.jsonl", "trainer_state.json", "wandb-history.jsonl", "wandb-summary.json")


@dataclass(frozen=True)
class Record:
    """What was logged together.

    Attributes:
        values: By name as it was logged; None for null.
        step: The training step, None where the record names none.
        run: The run, where a file or folder holds several; else empty.
    """

    values: Mapping[str, float | None]
    step: float | None = None
    run: str = ""


@dataclass
class Reading:
    """What is known of a file while it is read.

    Attributes:
        name: As the user named it.
        shape: Name of the reader.
        damage: How often something could not be read.
        has_tokens: Whether it looks like a dump with tokens.
    """

    name: str
    shape: str = ""
    damage: Counter[Damage] = field(default_factory=Counter)
    has_tokens: bool = False


Read = Callable[[BinaryIO, Reading], Iterator[Record]]
Sniff = Callable[[bytes, str], bool]


@dataclass(frozen=True)
class MetricReader:
    """A reader: `sniff` sees the first 64 KiB and the suffix in lower case."""

    name: str
    sniff: Sniff
    read: Read


_REGISTRY = Registry[MetricReader](__name__, "reader of metrics")


def metric_reader(name: str, sniff: Sniff) -> Callable[[Read], Read]:
    """Registers a reader.

    Raises:
        ValueError: The name is taken.
    """

    def register(read: Read) -> Read:
        _REGISTRY.add(name, MetricReader(name, sniff, read))
        return read

    return register


def read_metrics(source: str | Path | BinaryIO, reading: Reading) -> Iterator[Record]:
    """The records of a file, a folder or an open binary stream, in its order.

    Args:
        source: A path, or a stream such as standard input.
        reading: Filled while records are read.

    Raises:
        IngestError: It cannot be read, or is of a kind that holds no readable metrics.
    """
    if not isinstance(source, (str, Path)):
        yield from _read_stream(source, "", reading)
        return
    path = Path(source).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise IngestError(f"{source} does not exist.", "Check its path, or write - to read standard input.") from None
    except (OSError, ValueError):
        raise IngestError(f"{source} is not accessible.", "Check its path and permissions.") from None
    files = _files(path, reading) if stat.S_ISDIR(mode) else [(path, "")]
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise IngestError(f"{source} is not a regular file.", "Pipe it in and write - in its place.")
    for file, run in files:
        try:
            with file.open("rb") as handle:
                for record in _read_stream(handle, file.suffix.lower(), reading):
                    yield record if record.run or not run else Record(record.values, record.step, run)
        except OSError as error:
            what = f"{file} cannot be read: {error.strerror or error}."
            raise IngestError(what, "Check its permissions.") from None


def _files(folder: Path, reading: Reading) -> list[tuple[Path, str]]:
    """Event files below a folder with their runs, or the file of metrics in it."""
    events = sorted(path for path in folder.rglob("*tfevents*") if path.is_file())
    if events:
        runs = {path.parent for path in events}
        return [(path, str(path.parent.relative_to(folder)) if len(runs) > 1 else "") for path in events]
    for name in _FOUND_IN_FOLDERS:
        found = sorted(folder.rglob(name))
        if found:
            return [(found[-1], "")]
    if any(folder.rglob("*.wandb")):
        raise _wandb(reading.name)
    names = ", ".join(_FOUND_IN_FOLDERS)
    raise IngestError(f"The folder {reading.name} has no event files and none of {names}.", "Name the file of metrics.")


def _wandb(name: str) -> IngestError:
    what = f"{name} holds a wandb run in its binary format, which is not read."
    fix = "Sync it, then export the run's charts as CSV, or write wandb.Api().run(PATH).history() with to_csv()."
    return IngestError(what, fix)


def _read_stream(handle: BinaryIO, suffix: str, reading: Reading) -> Iterator[Record]:
    head = _first(handle)
    if not head.strip(b"\0\t\r\n "):
        raise IngestError(f"{reading.name} is empty.", f"Give {FORMATS}.")
    if head.startswith(b":W&B"):
        raise _wandb(reading.name)
    for one in sorted(_REGISTRY.all().values(), key=lambda one: one.name == _LAST):
        if one.sniff(head, suffix):
            reading.shape = one.name
            yield from one.read(_Rejoined.buffered(head, handle), reading)
            return
    raise IngestError(f"{reading.name} is a binary file of an unknown kind.", f"Give {FORMATS}.")


def _first(handle: BinaryIO) -> bytes:
    """The first 64 KiB, however few bytes a pipe hands out at a time."""
    parts, missing = [], HEAD
    while missing > 0 and (part := handle.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes have been read already."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    @classmethod
    def buffered(cls, head: bytes, rest: BinaryIO) -> io.BufferedReader:
        return io.BufferedReader(cls(head, rest), HEAD)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = len(buffer)
        part = self._head[:size] if self._head else memoryview(self._rest.read(size) or b"")
        self._head = self._head[len(part) :] if self._head else self._head
        buffer[: len(part)] = part
        return len(part)


def text_lines(handle: BinaryIO, reading: Reading) -> Iterator[str]:
    """Lines of text without their ends; of a line that is too long the rest is left out.

    A carriage return ends a line, as progress bars write them. What is not UTF-8, or UTF-16 with its mark, is replaced.
    """
    first = handle.peek(2)[:2] if isinstance(handle, io.BufferedReader) else b""
    encoding = "utf-16" if first in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = io.TextIOWrapper(handle, encoding, errors="replace")
    while line := text.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            reading.damage["line-cut"] += 1
            while (rest := text.readline(LONGEST_LINE)) and not rest.endswith("\n"):
                pass
        yield line.rstrip("\n")


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file can be text."""
    return b"\0" not in head or head[:2] in (b"\xff\xfe", b"\xfe\xff")
