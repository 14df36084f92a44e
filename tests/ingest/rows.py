"""What the tests of the readers share: rows, and both ways to write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
