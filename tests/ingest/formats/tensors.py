"""What the tests of readers of tensors share."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mismatch_probe.ingest.read import ReadOptions, read_dump

TRUSTED = ReadOptions(trust_pickle=True)


def rows(path: Path, options: ReadOptions = TRUSTED) -> list[dict[str, Any]]:
    """What a dump becomes: by key of the generic format, row by row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "recorded.parquet"
        read_dump(path, out, options)
        return list(pq.read_table(out).to_pylist())


def columns(path: Path, *keys: str) -> list[tuple[Any, ...]]:
    """Some keys of the rows of a dump."""
    return [tuple(row.get(key) for key in keys) for row in rows(path)]
