"""Seconds and peak memory of the whole analysis of a pair, by the number of its token rows.

Tables of 1, 3, 10 and 30 million rows in each of two passes are made row group by row group; then a process of its own
computes every metric, curve and bin with all bootstraps, as `compare` does for one pair.

    python benchmarks/stream_metrics.py
    python benchmarks/stream_metrics.py --rows 1000000 --prompts 1024
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mismatch_probe.config import CompareConfig, Sizes
from mismatch_probe.engines.devices import resident_peak
from mismatch_probe.results.manifest import Environment, Machine, Manifest, ModelRecord, PassRecord, PromptsRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.schemas import SEQUENCES_SCHEMA, TOKENS_SCHEMA

ROLLOUT, TRAINER = "vllm-bfloat16-decode", "hf-bfloat16-cast"
SHORTEST, LONGEST = 64, 4096
GROUP_TOKENS = 1 << 20
VOCABULARY = 50_000


def lengths_of(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Response lengths, log-uniform, that add up to `rows`."""
    lengths = np.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST), 2 + 2 * rows // SHORTEST)).astype(np.int64)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), rows) + 1]
    lengths[-1] -= lengths.sum() - rows
    return lengths


def token_groups(lengths: np.ndarray, pass_id: str) -> Iterator[pa.Table]:
    """A pass's token rows. Both passes draw the same tokens; the trainer's log-probs differ as in BF16."""
    rng, others = np.random.default_rng(1), np.random.default_rng(2)
    texts = pa.array([f"t{i}" for i in range(VOCABULARY)], pa.string())
    rollout = pass_id == ROLLOUT
    first = 0
    while first < len(lengths):
        some = lengths[first : first + max(1, int(np.searchsorted(np.cumsum(lengths[first:]), GROUP_TOKENS)))]
        n = int(some.sum())
        token_id = rng.integers(0, VOCABULARY, n, dtype=np.int32)
        logprob = -rng.exponential(0.6, n)
        error = rng.standard_t(4, n) * 0.01 * np.sqrt(-np.expm1(logprob))
        yield pa.table(
            {
                "sequence_id": np.repeat(np.arange(first, first + len(some)), some),
                "position": np.concatenate([np.arange(length, dtype=np.int32) for length in some]),
                "token_id": token_id,
                "pass_id": pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array([pass_id])),
                "logprob": (logprob if rollout else logprob + error).astype(np.float32),
                "token_text": pa.DictionaryArray.from_arrays(token_id, texts),
                "entropy": pa.nulls(n, pa.float32()) if rollout else others.exponential(1.0, n).astype(np.float32),
                "rank": pa.nulls(n, pa.int32()) if rollout else others.geometric(0.5, n).astype(np.int32) - 1,
            },
            schema=TOKENS_SCHEMA,
        )
        first += len(some)


def make_run(folder: Path, rows: int, prompts: int) -> None:
    """A finished run of one pair."""
    lengths = lengths_of(rows, np.random.default_rng(0))
    n = len(lengths)
    config = CompareConfig(model="synthetic", rollout_dtypes=("bfloat16",), trainer_dtypes=("bfloat16",))
    manifest = Manifest(
        **Manifest.stamp(),
        status="complete",
        created="",
        config=config,
        sizes=Sizes(prompts, n // prompts, int(lengths.max()), 1, 0, 1.0),
        device="cpu",
        model=ModelRecord(name="synthetic", path=""),
        prompts=PromptsRecord(source="synthetic", n=prompts, sha256=""),
        environment=Environment(versions={}, machine=Machine(cpu=""), variables={}),
    )
    run = RunDirectory.create(folder, manifest)
    sequences = pa.table(
        {
            "sequence_id": np.arange(n),
            "prompt_id": pa.array([f"p{i % prompts}" for i in range(n)]).dictionary_encode(),
            "sample_id": np.arange(n, dtype=np.int32) // prompts,
            "rollout_pass": pa.array([ROLLOUT] * n).dictionary_encode(),
            "prompt_token_ids": pa.array([[1]] * n, pa.list_(pa.int32())),
            "response_token_ids": pa.array([[]] * n, pa.list_(pa.int32())),
            "finish_reason": pa.array(["stop"] * n).dictionary_encode(),
            "text": pa.array([""] * n),
            "step": pa.nulls(n, pa.int64()),
        }
    ).cast(SEQUENCES_SCHEMA)
    for kind, groups, schema in (
        ("sequences", iter([sequences]), SEQUENCES_SCHEMA),
        ("tokens", (group for name in (ROLLOUT, TRAINER) for group in token_groups(lengths, name)), TOKENS_SCHEMA),
    ):
        with pq.ParquetWriter(folder / f"{kind}.parquet", schema, compression="zstd") as writer:
            for group in groups:
                writer.write_table(group)
    passes = run.manifest.passes
    passes[ROLLOUT] = PassRecord(status="finished", rows={"tokens": rows, "sequences": n})
    passes[TRAINER] = PassRecord(status="finished", rows={"tokens": rows}, covers=(ROLLOUT,))
    run.save()


def peak_mib() -> float:
    peak = resident_peak()
    if peak is None:
        raise SystemExit("There is no /proc/self/status to read the peak memory from: run this on Linux.")
    return peak / 2**20


def measure(folder: Path) -> dict[str, float]:
    """Seconds of `analyse`, and the peak memory of this process before and after it."""
    from mismatch_probe.probes.analysis import analyse

    before, start = peak_mib(), time.perf_counter()
    analyse(RunDirectory.open(folder)).report()
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_mib()}


@click.command()
@click.option("--rows", multiple=True, type=int, default=(1_000_000, 3_000_000, 10_000_000, 30_000_000))
@click.option("--prompts", default=512, show_default=True)
@click.option("--only", hidden=True, type=click.Path(path_type=Path))
def main(rows: tuple[int, ...], prompts: int, only: Path | None) -> None:
    if only is not None:
        print(json.dumps(measure(only)))
        return
    seconds = {}
    for n in rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            make_run(folder, n, prompts)
            command = [sys.executable, __file__, "--only", str(folder)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        seconds[n] = found["seconds"]
        print(
            f"{n:>12,} rows × 2 passes, {prompts} prompts: {found['seconds']:6.2f} s, "
            f"{2 * n / found['seconds'] / 1e6:5.2f} M rows/s, peak {found['peak']:6.0f} MiB "
            f"({found['before']:.0f} MiB before)",
            flush=True,
        )
    if len(seconds) > 1:
        exponent = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]
        print(f"seconds grow with rows to the power {exponent:.2f}")


if __name__ == "__main__":
    main()
