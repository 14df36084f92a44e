"""What range tracking costs: forward passes with every activation's peak taken, against the plain forward passes.

Both go over the same sequences, one at a time, in turns, in one process; the figure is the median of the ratios.

    python benchmarks/range_tracking.py [--model smollm2-135m] [--num-prompts 64] [--tokens 32] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from mismatch_probe.engines.audit.forward import ForwardTracker
from mismatch_probe.engines.encoding import EncodeJob, encode
from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.engines.models import resolve
from mismatch_probe.prompts import load_prompts


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of a response, drawn at random")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM

    path = str(resolve(options.model).path)
    prompts = encode(EncodeJob(path, load_prompts(None, options.num_prompts).prompts, False, False)).prompts
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    model.requires_grad_(False).eval()
    draw = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    responses = [draw.integers(vocabulary, size=options.tokens).tolist() for _ in prompts]
    batches = [Batch.of([p.token_ids], [r], model.device) for p, r in zip(prompts, responses, strict=True)]
    tracker = ForwardTracker(model)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            token_logprobs(model, batch, 1.0)

    @torch.inference_mode()
    def tracked() -> None:
        with tracker.watching():
            for batch in batches:
                tracker.sequence(batch.ids.shape[1], lambda batch=batch: token_logprobs(model, batch, 1.0))

    plain()
    ratios = [seconds(tracked) / seconds(plain) for _ in range(options.repeats)]
    tokens = sum(batch.ids.shape[1] for batch in batches)
    print(
        f"tracking {len(tracker.places)} tensors: {statistics.median(ratios):.2f}x the plain forward "
        f"(from {min(ratios):.2f} to {max(ratios):.2f}; {len(batches)} sequences, {tokens:,} tokens, "
        f"median of {options.repeats})"
    )


if __name__ == "__main__":
    main()
