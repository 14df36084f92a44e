"""What the tests of formats share: writing a dump, and reading back what was made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mismatch_probe.ingest.read import ReadOptions, read_dump
from mismatch_probe.results.dump import Recorded


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def read(path: Path, folder: Path, log: list[str] | None = None, **options: Any) -> tuple[Recorded, list[Any]]:
    """What a dump holds, and its rows as Python has them."""
    out = folder / "recorded.parquet"
    said = log if log is not None else []
    recorded = read_dump(path, out, ReadOptions(**options), said.append)
    return recorded, pq.read_table(out).to_pylist()


def assert_row(row: Any, expected: dict[str, Any]) -> None:
    """Floats are compared to the bit, NaN equals NaN; keys that `expected` does not name are not looked at."""
    for key, value in expected.items():
        if isinstance(value, list) and any(isinstance(one, float) for one in value):
            np.testing.assert_array_equal(np.array(row[key], np.float64), np.array(value, np.float64), key)
        else:
            assert row[key] == value, key
