"""The generic format, which any program can write, and what is mapped to it."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import GENERIC, dump_format
from mismatch_probe.ingest.keys import PROMPT, RESPONSE, SIDES, WHOLE
from mismatch_probe.ingest.values import plain


@dump_format(
    GENERIC,
    project="mismatch-probe",
    version="",
    containers=("jsonl", "json", "parquet"),
    layouts=((PROMPT, RESPONSE), *((WHOLE, side) for side in SIDES)),
    sides="rollout, trainer, or both",
)
def generic(record: Record) -> Iterator[Row]:
    """A row per record, under the keys of `ingest.keys`."""
    yield plain(record.fields)
