"""Tokens per second and peak memory of reading a dump, by its container and size.

A dump of both sides, 1,000 response tokens a row, is written; then a process of its own reads it as `ingest` does.

    python benchmarks/ingest.py
    python benchmarks/ingest.py --gib 2
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mismatch_probe.engines.devices import resident_peak

PROMPT, RESPONSE, ROWS = 100, 1000, 64
VOCABULARY = 150_000
CONTAINERS = ("jsonl", "parquet")


def batches() -> Iterator[dict[str, Any]]:
    """Columns of `ROWS` rows, without end; log-probs have seven digits after the point."""
    rng = np.random.default_rng(0)
    while True:
        rollout = -rng.exponential(0.5, (ROWS, RESPONSE))
        trainer = rollout + 0.01 * rng.standard_normal(rollout.shape)
        yield {
            "prompt_token_ids": rng.integers(VOCABULARY, size=(ROWS, PROMPT)).tolist(),
            "response_token_ids": rng.integers(VOCABULARY, size=(ROWS, RESPONSE)).tolist(),
            "rollout_logprobs": rollout.round(7).tolist(),
            "trainer_logprobs": np.minimum(trainer, 0).round(7).tolist(),
        }


def write_jsonl(path: Path, size: int) -> None:
    """A file of at least `size` bytes."""
    with path.open("w", encoding="utf-8") as handle:
        for columns in batches():
            handle.writelines(
                json.dumps({key: values[i] for key, values in columns.items()}) + "\n" for i in range(ROWS)
            )
            if handle.tell() >= size:
                return


def write_parquet(path: Path, size: int) -> None:
    """The same in one row group, as most writers leave it, uncompressed."""
    ids, logprobs = pa.list_(pa.int32()), pa.list_(pa.float64())
    schema = pa.schema({name: logprobs if "logprobs" in name else ids for name in next(batches())})
    groups, total = [], 0
    for columns in batches():
        groups.append(pa.table(columns, schema=schema))
        total += groups[-1].nbytes
        if total >= size:
            break
    table = pa.concat_tables(groups)
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=table.num_rows)


def measure(path: Path) -> dict[str, float]:
    """Seconds of `read_dump`, its tokens, and the peak memory of this process in MiB before and after it."""
    from mismatch_probe.ingest.read import read_dump

    before, start = resident_peak(), time.perf_counter()
    facts = read_dump(path, path.with_name("recorded.parquet")).file
    seconds, peak = time.perf_counter() - start, resident_peak()
    if before is None or peak is None:
        raise SystemExit("There is no /proc/self/status to read the peak memory from: run this on Linux.")
    return {"seconds": seconds, "tokens": facts.n_tokens, "before": before / 2**20, "peak": peak / 2**20}


@click.command(help=__doc__)
@click.option("--gib", default=1 / 16, show_default=True, help="size of each dump")
@click.option("--container", multiple=True, type=click.Choice(CONTAINERS), default=CONTAINERS)
@click.option("--only", hidden=True, type=click.Path(path_type=Path))
def main(gib: float, container: tuple[str, ...], only: Path | None) -> None:
    if only is not None:
        print(json.dumps(measure(only)))
        return
    for name in container:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"dump.{name}"
            {"jsonl": write_jsonl, "parquet": write_parquet}[name](path, int(gib * 2**30))
            command = [sys.executable, __file__, "--only", str(path)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            size = path.stat().st_size / 2**20
        print(
            f"{name}: {size:,.0f} MiB, {found['tokens']:,} tokens: {found['seconds']:.1f} s, "
            f"{found['tokens'] / found['seconds'] / 1e6:.2f} M tokens/s, {size / found['seconds']:.0f} MiB/s, "
            f"peak {found['peak']:.0f} MiB ({found['before']:.0f} MiB before), {found['peak'] / size:.2f} of the dump",
            flush=True,
        )


if __name__ == "__main__":
    main()
