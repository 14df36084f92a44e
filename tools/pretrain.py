"""Makes the small checkpoint that RL on the arithmetic tasks starts from: `python -m tools.pretrain OUT`.

Qwen3 with 4 layers, hidden size 128, tied embeddings and a character tokenizer, trained in FP32 to continue problems
with worked solutions of which a few results are wrong. A perfect imitator is wrong often enough that RL has something
to learn; how often is in `made.json`.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from mismatch_probe.rl.tasks import Response
from mismatch_probe.rl.tasks.arithmetic import ALPHABET, SEPARATORS, Calculation, ChainTask

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CORRUPTED = 0.05
_FREE_SHARE = 0.3
_BATCH = 64


def tokenizer() -> Any:
    """Characters as tokens; a prompt starts with `<s>`, a response ends with `</s>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model() -> Any:
    """Untrained, from torch's seed."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def solution(calculation: Calculation, rng: np.random.Generator, *, free: bool) -> str:
    """A worked solution; from a wrong result on it calculates rightly."""
    value, parts = calculation.start, []
    for operator, digit in zip(calculation.operators, calculation.digits, strict=True):
        value = Calculation(value, (operator,), (digit,)).results()[0]
        if rng.random() < _CORRUPTED:
            value = int(rng.integers(10))
        parts.append(f"{operator}{digit}{value}")
        if free:
            parts.append(SEPARATORS[rng.integers(len(SEPARATORS))])
            if rng.random() < 0.3:
                parts.append(str(value) * int(rng.integers(1, 4)))
    return "".join(parts) + ("=" + str(value) if free else "")


def batch(rng: np.random.Generator, encode: Any, operations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, L]` ids and labels; the prompt and the padding have no label."""
    rows = []
    for _ in range(_BATCH):
        free = bool(rng.random() < _FREE_SHARE)
        calculation = Calculation.draw(rng, operations)
        prompt = encode("?" * free + calculation.text)
        rows.append((prompt, [*encode(solution(calculation, rng, free=free))[1:], 2]))
    longest = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([[*p, *r] + [0] * (longest - len(p) - len(r)) for p, r in rows])
    labels = torch.tensor([[-100] * len(p) + r + [-100] * (longest - len(p) - len(r)) for p, r in rows])
    return ids, labels


@torch.no_grad()
def accuracy(network: Any, encoder: Any, task: ChainTask, seed: int) -> float:
    """Share of right responses at temperature 1, one a problem."""
    from transformers import GenerationConfig

    problems = task.problems()
    ids = torch.tensor([encoder(p.prompt)["input_ids"] for p in problems])
    torch.manual_seed(seed)
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=192, eos_token_id=2, pad_token_id=0)
    out = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling)[:, ids.shape[1] :]
    answers = [
        Response(encoder.decode(row, skip_special_tokens=True), "stop" if 2 in row else "length")
        for row in out.tolist()
    ]
    return float(np.mean(task.rewards(problems, answers)))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=2500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--operations", default=16, show_default=True)
def main(out: Path, steps: int, seed: int, operations: int) -> None:
    """Pretrains and writes a checkpoint with its tokenizer and `made.json`."""
    torch.manual_seed(seed)
    rng, network, encoder, started = np.random.default_rng(seed), model().train(), tokenizer(), time.perf_counter()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        ids, labels = batch(rng, lambda text: encoder(text)["input_ids"], operations)
        loss = network(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            click.echo(f"step {step}: loss {float(loss):.4f}, {time.perf_counter() - started:.0f} s")
    network.eval()
    found = {
        "chain": accuracy(network, encoder, ChainTask(128, 0, operations), 1),
        "chain_unseen": accuracy(network, encoder, ChainTask(128, 1, operations), 1),
        "reasoning": accuracy(network, encoder, ChainTask(128, 0, operations, free=True), 1),
    }
    network.save_pretrained(out)
    encoder.save_pretrained(out)
    made = {
        "script": "python -m tools.pretrain",
        "seed": seed,
        "steps": steps,
        "operations": operations,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "sampled_accuracy_of_128": found,
    }
    (out / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
