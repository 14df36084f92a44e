"""The generic format, which any program can write, and what is mapped to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Array, vector
from mismatch_probe.ingest.formats import GENERIC, dump_format
from mismatch_probe.ingest.keys import ATTENTION, IDS, PER_TOKEN, PROMPT, RESPONSE, SIDES, WHOLE
from mismatch_probe.ingest.values import plain


@dump_format(
    GENERIC,
    project="mismatch-probe",
    version="",
    containers=("jsonl", "json", "parquet", "torch", "pickle"),
    layouts=((PROMPT, RESPONSE), *((WHOLE, side) for side in SIDES)),
    sides="rollout, trainer, or both",
)
def generic(record: Record) -> Iterator[Row]:
    """A row per record, under the keys of `ingest.keys`; of a dict of columns, a row per sequence."""
    fields = plain(record.fields)
    named = [name for name in (*IDS, WHOLE) if fields.get(name) is not None]
    if not named or not all(_nested(fields[name]) for name in named):
        yield _unpadded(record, fields)
        return
    n = len(fields[named[0]])
    columns = {name: value for name, value in fields.items() if _is_list(value)}
    for name, column in columns.items():
        if len(column) != n:
            what = f"has {name} of {len(column)} sequences and {named[0]} of {n}"
            record.refuse(what, f"Write {name} of every sequence.")
    # Only an array has to be padded.
    padded = isinstance(fields[named[-1]], np.ndarray)
    for index in range(n):
        yield _unpadded(record, {**fields, **{name: column[index] for name, column in columns.items()}}, padded)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _nested(value: Any) -> bool:
    """Whether it holds lists: those of several sequences."""
    if isinstance(value, np.ndarray):
        return value.ndim == 2
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_list, value))


def _unpadded(record: Record, row: Row, padded: bool = False) -> Row:
    """A row without the padding that `attention_mask` names.

    Where a `padded` row has none, what is behind the last 1 of `loss_mask` is cut.
    """
    main = RESPONSE if row.get(RESPONSE) is not None else WHOLE
    attention = row.get(ATTENTION)
    row = {name: value for name, value in row.items() if name != ATTENTION}
    if not _is_list(row.get(main)) or (attention is None and not padded):
        return row
    n, before = len(row[main]), len(row[PROMPT]) if main == RESPONSE and _is_list(row.get(PROMPT)) else 0
    mask = np.ones(before + n, np.int64)
    if attention is not None:
        given = vector(record, ATTENTION, attention)
        if len(given) not in (before, before + n):
            what = f"has {len(given)} {ATTENTION} for {before + n} token ids"
            record.refuse(what, "Write one 0 or 1 per token.")
        mask[: len(given)] = given != 0
    elif row.get("loss_mask") is not None:
        counted = vector(record, "loss_mask", row["loss_mask"])
        if len(counted) == n:
            mask[before:] = np.cumsum(counted[::-1] != 0)[::-1] > 0
    if before:
        row[PROMPT] = row[PROMPT][_span(mask[:before])]
    kept = _span(mask[before:])
    return row | {
        name: value[kept]
        for name, value in row.items()
        if name in (main, *PER_TOKEN) and _is_list(value) and len(value) == n
    }


def _span(mask: Array) -> slice:
    """From the first to the last that is not 0."""
    places = np.flatnonzero(mask)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
