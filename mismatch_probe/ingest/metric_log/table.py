"""CSV with a header: a row per step. Columns of a wandb export are named `run - metric`, with `__MIN` and `__MAX`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from mismatch_probe.ingest.metric_log import (
    LONGEST_LINE,
    MOST_NAMES,
    Reading,
    Record,
    is_text,
    metric_reader,
    text_lines,
)
from mismatch_probe.ingest.metric_log.objects import as_number, is_number, record, step_of
from mismatch_probe.metrics.reported import STEPS

_DELIMITERS = (",", "\t", ";")
_RUN = " - "  # of a wandb export, between run and metric


def _sniff(head: bytes, suffix: str) -> bool:
    return is_text(head) and _delimiter(head) is not None


def _delimiter(head: bytes) -> str | None:
    """What separates a header and a row of as many fields that holds a number; None where the head is no table."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = [line for line in head.decode(encoding, errors="replace").splitlines()[:10] if line.strip()][:2]
    if len(lines) < 2 or lines[0].lstrip()[:1] in ("{", "["):
        return None
    for delimiter in _DELIMITERS:
        try:
            header, row = csv.reader(lines, delimiter=delimiter, strict=True)
        except (csv.Error, ValueError):
            continue
        named = len(header) > 1 and not any(is_number(cell.strip()) for cell in header)
        if named and len(row) == len(header) and any(is_number(cell.strip()) for cell in row):
            return delimiter
    return None


@metric_reader("csv", _sniff)
def read(handle: BinaryIO, reading: Reading) -> Iterator[Record]:
    """The records of the rows, those of each run apart. An empty field was not logged."""
    head = handle.peek(1) if hasattr(handle, "peek") else b""
    csv.field_size_limit(LONGEST_LINE)
    rows = csv.reader(text_lines(handle, reading), delimiter=_delimiter(head) or ",")
    columns = [_column(cell) for cell in next(rows, [])[:MOST_NAMES]]
    runs = dict.fromkeys(run for run, name in columns if name not in STEPS)
    while True:
        try:
            row = next(rows, None)
        except csv.Error:
            reading.damage["row-short"] += 1
            continue
        if row is None:
            return
        if not row:
            continue
        if len(row) < len(columns):
            reading.damage["row-short"] += 1
        yield from _records(columns, row, list(runs))


def _records(columns: list[tuple[str, str]], row: list[str], runs: list[str]) -> Iterator[Record]:
    shared: dict[str, float | None] = {}
    by_run: dict[str, dict[str, float | None]] = {run: {} for run in runs}
    for (run, name), cell in zip(columns, row, strict=False):
        text = cell.strip()
        value = None if text in ("None", "null") else text
        if value == "" or not is_number(value):
            continue
        (shared if name in STEPS else by_run[run])[name] = as_number(value)
    step = step_of(shared)
    for run, values in by_run.items():
        if values:
            yield Record(record(values, step).values, step, run)


def _column(cell: str) -> tuple[str, str]:
    """Run and name of a column."""
    run, separator, name = cell.strip().rpartition(_RUN)
    return (run, name) if separator else ("", cell.strip())
