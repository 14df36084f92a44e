"""Tokens per second and peak memory of reading a dump, by its container and size.

A dump of both sides, 1,000 response tokens a row, is written; then a process of its own reads it as `ingest` does,
compares the two sides as `compare --from` does, or diagnoses them as `diagnose` does. 16 rows answer one prompt; a
SQLite dump has four prompts in all.

    python benchmarks/ingest.py
    python benchmarks/ingest.py --gib 2
    python benchmarks/ingest.py --gib 2 --container jsonl --what compare
    python benchmarks/ingest.py --gib 0.31 --container jsonl --what diagnose
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mismatch_probe.engines.devices import resident_peak

PROMPT, RESPONSE, ROWS = 100, 1000, 64
VOCABULARY = 150_000
CONTAINERS = ("jsonl", "parquet", "sqlite")
SAMPLES = 16


def batches() -> Iterator[dict[str, Any]]:
    """Columns of `ROWS` rows, without end; log-probs have seven digits after the point."""
    rng = np.random.default_rng(0)
    while True:
        rollout = -rng.exponential(0.5, (ROWS, RESPONSE))
        trainer = rollout + 0.01 * rng.standard_normal(rollout.shape)
        yield {
            "prompt_token_ids": rng.integers(VOCABULARY, size=(ROWS // SAMPLES, PROMPT)).repeat(SAMPLES, 0).tolist(),
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


def write_sqlite(path: Path, size: int) -> None:
    """A ledger of martingale, a score a row."""
    digest = "0" * 64
    with sqlite3.connect(path) as database:
        database.executescript(
            "CREATE TABLE llm_revisions (digest TEXT PRIMARY KEY, step INTEGER);"
            "CREATE TABLE sequences (actor_id INTEGER, sequence_index INTEGER, digest TEXT UNIQUE, record_json TEXT);"
            "CREATE TABLE scores (sequence_digest TEXT, position INTEGER, train_revision_digest TEXT, record_json TEXT,"
            " PRIMARY KEY (sequence_digest, position, train_revision_digest));"
            "INSERT INTO llm_revisions VALUES ('r', 1);"
        )
        for first, columns in enumerate(batches()):
            for row in range(ROWS):
                name = f"s{first * ROWS + row:08}"
                ids, *sides = (
                    columns[key][row] for key in ("response_token_ids", "rollout_logprobs", "trainer_logprobs")
                )
                b, a = ([f"f32:{bits:08x}" for bits in np.array(one, ">f4").view(">u4").tolist()] for one in sides)
                tokens = [
                    {"revision_digest": "r", "position": place, "token_id": one, "logprob_bits": bits, "digest": digest}
                    for place, (one, bits) in enumerate(zip(ids, b, strict=True))
                ]
                record = json.dumps({"prompt_digest": f"p{row // SAMPLES}", "tokens": tokens})
                database.execute("INSERT INTO sequences VALUES (0, ?, ?, ?)", (first * ROWS + row, name, record))
                scores = [
                    (name, place, "r", json.dumps({"logprob_bits": bits, "digest": digest}))
                    for place, bits in enumerate(a)
                ]
                database.executemany("INSERT INTO scores VALUES (?, ?, ?, ?)", scores)
            database.commit()
            if path.stat().st_size >= size:
                break
    database.close()


def read(path: Path) -> int:
    """What `ingest` reads; returns its response tokens."""
    from mismatch_probe.ingest.read import read_dump

    return read_dump(path, path.with_name("recorded.parquet")).file.n_tokens


def compared(path: Path) -> int:
    """What `compare --from` does, its pages included."""
    import mismatch_probe

    return mismatch_probe.compare(source=str(path), out=path.with_name("run")).summary.pairs[0].n_tokens


def diagnosed(path: Path) -> int:
    """What `diagnose` does."""
    import mismatch_probe

    return mismatch_probe.diagnose(path).source.n_tokens


WHAT: dict[str, Callable[[Path], int]] = {"ingest": read, "compare": compared, "diagnose": diagnosed}


def measure(path: Path, what: str) -> dict[str, float]:
    """Seconds, tokens, and the peak memory of this process in MiB before and after it."""
    before, start = resident_peak(), time.perf_counter()
    tokens = WHAT[what](path)
    seconds, peak = time.perf_counter() - start, resident_peak()
    if before is None or peak is None:
        raise SystemExit("There is no /proc/self/status to read the peak memory from: run this on Linux.")
    return {"seconds": seconds, "tokens": tokens, "before": before / 2**20, "peak": peak / 2**20}


@click.command(help=__doc__)
@click.option("--gib", default=1 / 16, show_default=True, help="size of each dump")
@click.option("--container", multiple=True, type=click.Choice(CONTAINERS), default=CONTAINERS)
@click.option("--what", type=click.Choice(list(WHAT)), default="ingest", show_default=True)
@click.option("--only", hidden=True, type=click.Path(path_type=Path))
def main(gib: float, container: tuple[str, ...], what: str, only: Path | None) -> None:
    if only is not None:
        print(json.dumps(measure(only, what)))
        return
    for name in container:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"dump.{name}"
            {"jsonl": write_jsonl, "parquet": write_parquet, "sqlite": write_sqlite}[name](path, int(gib * 2**30))
            command = [sys.executable, __file__, "--only", str(path), "--what", what]
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
