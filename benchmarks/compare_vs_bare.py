"""Whole `compare` against a bare script on the same work, as a ratio of wall-clock times in one run.

The bare side is what one writes by hand: one process that builds a vLLM engine per dtype and calls `generate`, and one
process that loads the model per dtype and runs a plain loop of forward passes over all the responses. Two processes,
because in the process that held vLLM the forward pass inherits its thread binding and is several times slower.

    python benchmarks/compare_vs_bare.py --num-prompts 16 --max-tokens 16
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

DTYPES = ("bfloat16", "float16", "float32")


def bare_rollout(model: str, prompts: list[list[int]], max_tokens: int, out: Path) -> None:
    from vllm import LLM, SamplingParams

    sampled = {}
    for dtype in DTYPES:
        llm = LLM(
            model,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=max(map(len, prompts)) + max_tokens,
            kv_cache_memory_bytes=1 << 30,
        )
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(seed=i, max_tokens=max_tokens, logprobs=0) for i in range(len(prompts))],
        )
        sampled[dtype] = [list(o.outputs[0].token_ids) for o in outputs]
        llm.llm_engine.engine_core.shutdown()
        del llm
    out.write_text(json.dumps(sampled))


def bare_scores(model: str, prompts: list[list[int]], sampled: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    responses = json.loads(sampled.read_text())
    for dtype in DTYPES:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        for source in DTYPES:
            for prompt, response in zip(prompts, responses[source], strict=True):
                ids = torch.tensor([prompt + response])
                with torch.inference_mode():
                    logprobs = network(ids).logits.float().log_softmax(-1)
                logprobs[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])


def timed(command: list[str], **environment: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    return time.perf_counter() - start


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--num-prompts", default=16, show_default=True)
@click.option("--max-tokens", default=16, show_default=True)
@click.option("--repeats", default=1, show_default=True)
@click.option("--stage", hidden=True)
@click.option("--work", hidden=True, type=click.Path(path_type=Path))
def main(model: str, num_prompts: int, max_tokens: int, repeats: int, stage: str | None, work: Path | None) -> None:
    if stage is not None and work is not None:
        prompts = json.loads((work / "prompts.json").read_text())
        if stage == "rollout":
            bare_rollout(model, prompts, max_tokens, work / "sampled.json")
        else:
            bare_scores(model, prompts, work / "sampled.json")
        return
    from mismatch_probe.engines.encoding import EncodeJob, encode
    from mismatch_probe.engines.models import resolve
    from mismatch_probe.prompts import load_prompts

    folder = str(resolve(model).path)
    encoded = encode(EncodeJob(folder, load_prompts(None, num_prompts).prompts, False, False)).prompts
    sizes = ["--num-prompts", str(num_prompts), "--max-tokens", str(max_tokens)]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "prompts.json").write_text(json.dumps([p.token_ids for p in encoded]))
        for repeat in range(repeats):
            run = str(Path(scratch) / f"run-{repeat}")
            probe = [sys.executable, "-m", "mismatch_probe", "compare", "--model", model, *sizes, "--out"]
            ours = timed([*probe, run, "--rollout-batch", str(num_prompts), "--self-noise-tokens", "0"])
            bare = [sys.executable, __file__, "--model", folder, *sizes, "--work", scratch, "--stage"]
            offline = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
            theirs = sum(timed([*bare, stage], **offline) for stage in ("rollout", "score"))
            print(
                f"compare {ours:.1f} s, bare script {theirs:.1f} s: {ours / theirs:.2f}x (below 1: compare is faster)"
            )


if __name__ == "__main__":
    main()
