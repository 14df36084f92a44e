"""Response tokens per second that the accounting of a dump takes in, by what the dump holds.

Rows of 64 to 4,096 tokens come one by one, as from JSON Lines, or 256 at a time, as from Parquet.

    python benchmarks/account_dump.py
    python benchmarks/account_dump.py --tokens 2000000
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import click
import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.accounting import Accounting
from mismatch_probe.ingest.base import Place
from mismatch_probe.ingest.chunk import Chunk, Lists

SHORTEST, LONGEST, PROMPT = 64, 4096, 200
VOCABULARY = 50_000


def lengths_of(tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Response lengths, log-uniform, that add up to about `tokens`."""
    lengths = np.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST), 2 + 2 * tokens // SHORTEST)).astype(np.int64)
    return lengths[: np.searchsorted(np.cumsum(lengths), tokens) + 1]


def chunks(tokens: int, rows_per_chunk: int, kind: str) -> Iterator[Chunk]:
    """Rows with both sides in float64; `kind` says what is wrong with them."""
    rng = np.random.default_rng(0)
    lengths = lengths_of(tokens, rng)
    n = int(lengths.sum())
    rollout = -rng.exponential(0.6, n)
    trainer = np.minimum(rollout + rng.standard_t(4, n) * 0.01 * np.sqrt(-np.expm1(rollout)), -1e-6)
    rollout = np.minimum(rollout, -1e-6)
    mask = np.ones(n, np.int8)
    if kind == "placeholders":
        rollout[rng.random(n) < 0.02] = -9999.0
    elif kind == "constants":
        for end in np.cumsum(lengths).tolist():
            rollout[end - 20 : end] = -1.0
    elif kind == "masked":
        mask[rng.random(n) < 0.2] = 0
    ids = rng.integers(0, VOCABULARY, n)
    prompt = rng.integers(0, VOCABULARY, PROMPT)
    ends = np.cumsum(lengths)
    for first in range(0, len(lengths), rows_per_chunk):
        some = lengths[first : first + rows_per_chunk]
        part = slice(int(ends[first] - lengths[first]), int(ends[first + len(some) - 1]))
        lists = {
            "prompt_token_ids": Lists(np.tile(prompt, len(some)), np.full(len(some), PROMPT)),
            "response_token_ids": Lists(ids[part], some),
            "rollout_logprobs": Lists(rollout[part], some),
            "trainer_logprobs": Lists(trainer[part], some),
        }
        if kind == "masked":
            lists["loss_mask"] = Lists(mask[part], some)
        places = [Place("dump.jsonl", "Line")] * len(some)
        yield Chunk(places, np.arange(first + 1, first + 1 + len(some)), lists, {})


@click.command(help=__doc__)
@click.option("--tokens", default=5_000_000, show_default=True, help="Response tokens.")
def main(tokens: int) -> None:
    for kind in ("sound", "masked", "placeholders", "constants"):
        for rows in (1, 256):
            given = list(chunks(tokens, rows, kind))
            n = sum(len(chunk.lists["response_token_ids"].values) for chunk in given)
            accounting, start = Accounting(VOCABULARY), time.perf_counter()
            for chunk in given:
                accounting.update(chunk)
            codes = [finding.code for finding in accounting.findings()]
            seconds = time.perf_counter() - start
            click.echo(f"{kind:<13} {rows:>4} rows a chunk: {n / seconds / 1e6:5.1f} M tokens/s  {' '.join(codes)}")


if __name__ == "__main__":
    main()
