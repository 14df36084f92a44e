"""Trainer scoring against TRL's per-token log-prob function: throughput and peak memory above the weights, as ratios.

Both sides score the same mixed-length sequences on the same model, each in a process of its own, in turn. TRL gets its
sequences as its GRPO trainer lays them out: prompts padded on the left, completions on the right, in batches of 8.

    python benchmarks/score_vs_trl.py --dtype float32 --repeats 3
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import click

TRL_BATCH = 8


def sequences(count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of 10 to 60 tokens and responses of 16 to 256, most of them short, as sampled responses are."""
    import numpy as np

    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt, response = int(draw.integers(10, 61)), int(16 * 16 ** draw.random())
        made.append((draw.integers(5, vocabulary, prompt).tolist(), draw.integers(5, vocabulary, response).tolist()))
    return made


def score_ours(model: str, dtype: str, data: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    from mismatch_probe.engines.base import TrainerJob
    from mismatch_probe.engines.devices import GIB, default_sizes
    from mismatch_probe.engines.hf.engine import HfTrainer
    from mismatch_probe.types import ScoreRequest

    requests = [ScoreRequest(i, prompt, response) for i, (prompt, response) in enumerate(data)]
    budget = int(default_sizes("cpu").memory_budget_gib * GIB)
    engine = HfTrainer(TrainerJob("hf", model, dtype, "cast", "padded", "sdpa", "cpu", 1.0, requests, 0, budget))  # type: ignore[arg-type]

    def run() -> float:
        return float(sum(sum(score.logprobs) for batch in engine.plan(requests) for score in engine.score(batch, 1.0)))

    return measured(run)


def score_trl(model: str, dtype: str, data: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    # What its trainer does to a model before it calls the function; the function reads nothing else of its trainer.
    add_fused_lm_head(network)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    prompts = pad([p for p, _ in data], left=True)
    responses = pad([r for _, r in data], left=False)
    ids = torch.cat([prompts[0], responses[0]], 1)
    mask = torch.cat([prompts[1], responses[1]], 1)

    def run() -> float:
        with torch.no_grad():
            # Without the decorator that times it for a logger.
            found = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__(
                trainer, network, ids, mask, responses[0].shape[1], batch_size=TRL_BATCH
            )[0]
        return float(found[responses[1].bool()].double().sum())

    return measured(run)


def pad(rows: list[list[int]], *, left: bool) -> tuple[Any, Any]:
    import torch

    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [gap + one if left else one + gap for one, gap in zip(ones, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def measured(run: Callable[[], float]) -> dict[str, float]:
    import torch

    from mismatch_probe.engines.devices import peak_bytes, reset_peak

    cpu = torch.device("cpu")
    reset_peak(cpu)
    weights = peak_bytes(cpu) or 0
    start = time.perf_counter()
    total = run()
    return {"seconds": time.perf_counter() - start, "bytes": float((peak_bytes(cpu) or 0) - weights), "total": total}


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--count", default=32, show_default=True, help="Sequences.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--side", hidden=True)
def main(model: str, dtype: str, count: int, repeats: int, side: str | None) -> None:
    from mismatch_probe.engines.models import resolve

    reference = resolve(model)
    data = sequences(count, reference.config["vocab_size"])
    if side is not None:
        print(json.dumps((score_ours if side == "ours" else score_trl)(str(reference.path), dtype, data)))
        return
    tokens = sum(len(p) + len(r) for p, r in data)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for _ in range(repeats):
        for name, rows in found.items():
            command = [
                sys.executable,
                __file__,
                "--model",
                model,
                "--dtype",
                dtype,
                "--count",
                str(count),
                "--side",
                name,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    ours, trl = (
        {key: statistics.median(row[key] for row in rows) for key in ("seconds", "bytes", "total")}
        for rows in found.values()
    )
    for name, side_ in (("mismatch-probe", ours), ("TRL", trl)):
        print(
            f"{name:<15} {tokens / side_['seconds']:8.0f} tokens/s  {side_['bytes'] / 2**20:8.0f} MiB above the weights"
        )
    faster, leaner = trl["seconds"] / ours["seconds"], ours["bytes"] / trl["bytes"]
    print(f"both sides' log-probs sum to {ours['total']:.2f} and {trl['total']:.2f}")
    print(f"throughput {faster:.2f}x, memory {leaner:.2f}x ({dtype}, n = {count}, median of {repeats})")


if __name__ == "__main__":
    main()
