"""What exact KL costs: against scoring the same tokens, and against vLLM's public full-vocabulary output.

Scoring is what a comparison does anyway: vLLM decodes the tokens, the trainer scores them. With `--exact-kl all` the
engine keeps the full row of logits at every token and the trainer compares its own with it. Loading is left out. The
public way asks vLLM for all log-probs of every token (`logprobs=-1`), and only gets as far as having one side's.

    python benchmarks/exact_kl.py --dtype bfloat16 --num-prompts 16 --max-tokens 32
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click


def compare(model: str, dtype: str, num_prompts: int, max_tokens: int, exact: str, out: Path) -> dict[str, Any]:
    """Seconds of decoding and of scoring, and the number of tokens and of rows."""
    import mismatch_probe

    config = {
        "model": model,
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "rollout_batch": num_prompts,
        "rollout_dtypes": (dtype,),  # type: ignore[arg-type]
        "trainer_dtypes": (dtype,),  # type: ignore[arg-type]
        "self_noise_tokens": 0,
        "exact_kl": "all" if exact == "all" else int(exact),
    }
    run = mismatch_probe.compare(**config, out=out)
    passes, pair = run.data.manifest.passes, run.summary.pairs[0]
    return {
        "decode": passes[f"vllm-{dtype}-decode"].timings["generate"],
        "score": passes[f"hf-{dtype}-cast"].timings["score"],
        "tokens": pair.n_tokens,
        "rows": passes[f"hf-{dtype}-cast"].rows.get("exact", 0),
        "kl_exact": asdict(pair.metrics["kl_exact"]),
    }


def public(model: str, dtype: str, prompts: list[list[int]], max_tokens: int) -> tuple[float, float, int]:
    """Seconds of vLLM's own full-vocabulary output, seconds of the same tokens without it, and rows."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + max_tokens,
        kv_cache_memory_bytes=1 << 30,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]

    def run(tokens: int, logprobs: int) -> tuple[float, int]:
        params = SamplingParams(seed=0, max_tokens=tokens, min_tokens=tokens, logprobs=logprobs, flat_logprobs=True)
        start = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)  # type: ignore[arg-type]
        return time.perf_counter() - start, sum(len(o.outputs[0].token_ids) for o in outputs)

    run(1, 0)
    plain, _ = run(max_tokens, 0)
    seconds, rows = run(max_tokens, -1)
    return seconds, plain, rows


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--num-prompts", default=16, show_default=True)
@click.option("--max-tokens", default=32, show_default=True)
@click.option("--exact-kl", default="all", show_default=True, help="Rows kept, or all.")
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--public-tokens", default=8, show_default=True, help="Tokens of each of 4 prompts that go the public way."
)
@click.option("--stage", hidden=True)
def main(
    model: str,
    dtype: str,
    num_prompts: int,
    max_tokens: int,
    exact_kl: str,
    repeats: int,
    public_tokens: int,
    stage: str,
) -> None:
    from mismatch_probe.engines.models import resolve

    folder = str(resolve(model).path)
    if stage is not None:
        seconds, without, rows = public(folder, dtype, json.loads(stage), public_tokens)
        print(json.dumps({"seconds": seconds, "plain": without, "rows": rows}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        plain, exact = [], []
        for repeat in range(repeats):  # in turn, since the machine's speed drifts
            for found, wanted in ((plain, "0"), (exact, exact_kl)):
                found.append(
                    compare(model, dtype, num_prompts, max_tokens, wanted, Path(scratch) / f"{wanted}-{repeat}")
                )
        median = {
            name: {phase: statistics.median(run[phase] for run in runs) for phase in ("decode", "score")}
            for name, runs in (("plain", plain), ("exact", exact))
        }
        command = [sys.executable, __file__, "--model", model, "--dtype", dtype, "--public-tokens", str(public_tokens)]
        prompts = json.dumps([[5, 6, 7, 8, 9, 10 + i] for i in range(4)])
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(
            [*command, "--stage", prompts], check=True, stdout=subprocess.PIPE, text=True, env=offline
        )
        open_way = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    tokens, rows = exact[0]["tokens"], exact[0]["rows"]
    for name, phases in median.items():
        print(f"{name:<6} decode {phases['decode']:7.2f} s, score {phases['score']:7.2f} s")
    whole, without = sum(median["exact"].values()), sum(median["plain"].values())
    print(
        f"exact rows of {rows} of {tokens} tokens: {whole / without:.2f}x the time of scoring them "
        f"({dtype}, median of {repeats})"
    )
    ours, theirs = 1000 * whole / rows, 1000 * open_way["seconds"] / open_way["rows"]
    print(f"a row with all its work: exact {ours:.1f} ms, public output {theirs:.0f} ms: {theirs / ours:.0f}x")
    added = 1000 * max(whole - without, 1e-9) / rows
    theirs_added = 1000 * (open_way["seconds"] - open_way["plain"]) / open_way["rows"]
    print(
        f"what a row adds: exact {added:.1f} ms, public output {theirs_added:.0f} ms: {theirs_added / added:.0f}x "
        f"(public: n = {open_way['rows']} rows)"
    )


if __name__ == "__main__":
    main()
