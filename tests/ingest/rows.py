"""What the tests of the readers share: rows, both ways to write them, and a dump as it was read."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mismatch_probe.ingest.read import ReadOptions, read_dump
from mismatch_probe.results.dump import Recorded, Source

Row = dict[str, Any]
TYPES = {
    "prompt_token_ids": pa.list_(pa.int64()),
    "response_token_ids": pa.list_(pa.int64()),
    "rollout_logprobs": pa.list_(pa.float64()),
    "trainer_logprobs": pa.list_(pa.float64()),
    "loss_mask": pa.list_(pa.int8()),
    "step": pa.int64(),
    "prompt_id": pa.string(),
    "finish_reason": pa.string(),
}


def row(**changes: Any) -> Row:
    """A good row with both sides; a change to None leaves the key out."""
    good: Row = {
        "prompt_token_ids": [5, 6, 7],
        "response_token_ids": [8, 9],
        "rollout_logprobs": [-0.5, -1.25],
        "trainer_logprobs": [-0.75, -1.0],
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def write_jsonl(folder: Path, rows: list[Row], name: str = "run.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def write_parquet(folder: Path, rows: list[Row], name: str = "run.parquet", **types: pa.DataType) -> Path:
    """Only the columns that some row has; `types` replaces and adds to those of the format."""
    path = folder / name
    named = {key for each in rows for key in each}
    columns = {
        key: pa.array([each.get(key) for each in rows], kind) for key, kind in (TYPES | types).items() if key in named
    }
    pq.write_table(pa.table(columns), path)
    return path


@dataclass(frozen=True)
class Read:
    """A dump as it was read.

    Attributes:
        recorded: What is said of it.
        table: What was written.
    """

    recorded: Recorded
    table: pa.Table

    @property
    def file(self) -> Source:
        """What is said of the dump."""
        return self.recorded.file

    def __getitem__(self, key: str) -> list[Any]:
        """A column, a value per row; lists are lists."""
        return list(self.table[key].to_pylist())

    def values(self, key: str) -> NDArray[Any]:
        """All values of a list column in a row."""
        return np.asarray(pc.list_flatten(self.table[key]).to_numpy())

    @property
    def sides(self) -> tuple[str, ...]:
        """Whose log-probs there are."""
        return tuple(side for side in ("rollout", "trainer") if getattr(self.recorded, side))

    @property
    def rows(self) -> list[Row]:
        """The rows as Python values, without where they come from."""
        return list(self.table.drop_columns(["file"]).to_pylist())


def read(path: str | Path, **options: Any) -> Read:
    """Reads a dump; `options` are those of `ReadOptions`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recorded.parquet"
        recorded = read_dump(path, file, ReadOptions(**options))
        assert [one.name for one in file.parent.iterdir()] == [file.name]
        return Read(recorded, pq.read_table(file))
