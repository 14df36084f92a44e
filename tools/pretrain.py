"""Makes the small checkpoints that RL starts from: `python -m tools.pretrain chain OUT` and `… lines OUT`.

- `chain`: Qwen3 with 4 layers, hidden size 128, tied embeddings and a character tokenizer, trained to continue problems
  of arithmetic with worked solutions of which a few results are wrong.
- `lines`: Qwen3 or Qwen3-MoE in one of several shapes with a tokenizer of its own, trained to write program text that
  has a property. The text is the standard library of the Python that runs this (PSF licence), line by line without
  indentation. Stored in BF16, as published checkpoints are.

A perfect imitator is wrong often enough that RL has something to learn; how often is in `made.json`. Trained in FP32.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from mismatch_probe.rl.tasks import Response, Task
from mismatch_probe.rl.tasks.arithmetic import ALPHABET, SEPARATORS, Calculation, ChainTask
from mismatch_probe.rl.tasks.lines import (
    FEWEST_LINES,
    MOST_LINES,
    WORDS,
    LinesTask,
    Property,
    words_of,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
Pair = tuple[list[int], list[int]]
_RATE = 3e-3
_CORRUPTED = 0.05
_FREE_SHARE = 0.3
_SHORTEST_LINE, _LONGEST_LINE = 24, 60
_UNTRUE = 0.1


@dataclass(frozen=True)
class Shape:
    """A Qwen3, with experts a Qwen3-MoE of which a token takes two; heads of 32."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    experts: int
    inner: int


CHAIN = Shape(4, 128, 4, 2, 0, 320)
SHAPES = {
    "mix-8": Shape(8, 128, 4, 4, 16, 48),
    "mix-8-narrow": Shape(8, 64, 2, 2, 16, 32),
    "mix-12": Shape(12, 96, 3, 3, 16, 32),
    "mix-16": Shape(16, 96, 3, 3, 16, 32),
    "dense-16": Shape(16, 128, 4, 4, 0, 320),
    "dense-24": Shape(24, 96, 3, 3, 0, 256),
}


def wrapped(core: Any) -> Any:
    """A tokenizer of transformers; a prompt starts with `<s>`, a response ends with `</s>`."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def characters() -> Any:
    """The characters of arithmetic as tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return wrapped(core)


def pieces(text: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE of so many tokens; characters where that is fewer than there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # As byte-level BPE writes a line feed and a blank.
    alphabet = sorted({"Ċ", "Ġ", *(c for line in text for c in line if c != " ")})
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, len(alphabet) + len(SPECIAL)),
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator((line + "\n" for line in text), trainer)
    return wrapped(core)


def model(shape: Shape, vocabulary: int, positions: int) -> Any:
    """Untrained, from torch's seed."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": 32,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if not shape.experts:
        return AutoModelForCausalLM.from_config(Qwen3Config(**common))
    experts = {"num_experts": shape.experts, "num_experts_per_tok": 2, "moe_intermediate_size": shape.inner}
    # Without the loss that spreads tokens over the experts a few of them would take all.
    spread = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**common, **experts, **spread, norm_topk_prob=True))


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


def calculations(encoder: Any, operations: int, seed: int) -> Callable[[], Pair]:
    """Draws problems with solutions, as token ids."""
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        free = bool(rng.random() < _FREE_SHARE)
        calculation = Calculation.draw(rng, operations)
        prompt = encoder("?" * free + calculation.text)["input_ids"]
        return prompt, [*encoder(solution(calculation, rng, free=free))["input_ids"][1:], 2]

    return draw


def library() -> list[str]:
    """Lines of the standard library that are neither short nor long, in the order of its files."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
        found += [s for s in lines if s.isascii() and s.isprintable() and _SHORTEST_LINE <= len(s) <= _LONGEST_LINE]
    return found


def texts(encoder: Any, lines: Sequence[str], seed: int) -> Callable[[], Pair]:
    """Draws prompts with consecutive lines that have the property, as token ids; in some prompts one of the words to
    avoid may be there.
    """
    rng = np.random.default_rng(seed)
    ids = [encoder(line + "\n", add_special_tokens=False)["input_ids"] for line in lines]
    known = [words_of(line) & set(WORDS) for line in lines]

    def draw() -> Pair:
        while True:
            n_lines = int(rng.integers(FEWEST_LINES, MOST_LINES + 1))
            start = int(rng.integers(len(lines) - n_lines))
            rows = range(start, start + n_lines)
            absent = sorted(set(WORDS) - set().union(*(known[i] for i in rows)))
            if len(absent) < 2 or len({lines[i] for i in rows}) < n_lines:
                continue
            pair = [str(word) for word in rng.choice(absent, 2, replace=False)]
            if rng.random() < _UNTRUE:
                pair[1] = str(rng.choice([word for word in WORDS if word not in pair]))
            first, second = sorted(pair)
            response = [token for i in rows for token in ids[i]]
            # The last line feed gives way to the end.
            return encoder(Property(n_lines, (first, second)).prompt)["input_ids"], [*response[:-1], 2]

    return draw


def train(network: Any, draw: Callable[[], Pair], steps: int, batch: int) -> float:
    """Trains on as many batches of pairs; the loss, nats per token of a response, over the last 50 steps."""
    started, losses = time.perf_counter(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        rows = [draw() for _ in range(batch)]
        longest = max(len(p) + len(r) for p, r in rows)
        # The prompt and the padding have no label.
        ids = torch.tensor([[*p, *r] + [0] * (longest - len(p) - len(r)) for p, r in rows])
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (longest - len(p) - len(r)) for p, r in rows])
        loss = network(input_ids=ids, labels=labels, attention_mask=(ids != 0).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            click.echo(f"step {step}: loss {np.mean(losses[-50:]):.4f}, {time.perf_counter() - started:.0f} s")
    return float(np.mean(losses[-50:]))


@torch.no_grad()
def accuracy(network: Any, encoder: Any, task: Task, longest: int) -> dict[str, float]:
    """Share of right responses at temperature 1, one a problem, and their mean length in tokens."""
    from transformers import GenerationConfig

    problems = task.problems()
    prompts = [encoder(p.prompt)["input_ids"] for p in problems]
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(p)) + p for p in prompts])
    torch.manual_seed(1)
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=2, pad_token_id=0)
    out = network.generate(ids, attention_mask=(ids != 0).long(), generation_config=sampling)[:, most:].tolist()
    kept = [row[: row.index(2)] if 2 in row else row for row in out]
    answers = [
        Response(encoder.decode(row), "stop" if 2 in whole else "length") for row, whole in zip(kept, out, strict=True)
    ]
    return {"right": float(np.mean(task.rewards(problems, answers))), "tokens": float(np.mean([*map(len, kept)]))}


def save(out: Path, network: Any, encoder: Any, made: dict[str, Any]) -> None:
    """Writes a checkpoint with its tokenizer and `made.json`."""
    out.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(out)
    encoder.save_pretrained(out)
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    (out / "made.json").write_text(json.dumps({**made, "versions": versions}, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(made))


@click.group()
def main() -> None:
    """Pretrains the small checkpoints that RL starts from."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=2500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--operations", default=16, show_default=True)
def chain(out: Path, steps: int, seed: int, operations: int) -> None:
    """For the tasks chain and reasoning."""
    torch.manual_seed(seed)
    encoder, network = characters(), model(CHAIN, 32, 512).train()
    train(network, calculations(encoder, operations, seed), steps, batch=64)
    network.eval()
    tasks = {
        "chain": ChainTask(128, 0, operations),
        "chain_unseen": ChainTask(128, 1, operations),
        "reasoning": ChainTask(128, 0, operations, free=True),
    }
    found = {name: accuracy(network, encoder, task, 192)["right"] for name, task in tasks.items()}
    asked = {"script": "python -m tools.pretrain chain", "seed": seed, "steps": steps, "operations": operations}
    save(out, network, encoder, {**asked, "sampled_accuracy_of_128": found})


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", default="mix-8", show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--vocabulary", default=512, show_default=True, help="Tokens; 0 for characters.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--seed", default=0, show_default=True)
def lines(out: Path, shape: str, vocabulary: int, steps: int, batch: int, seed: int) -> None:
    """For the task lines."""
    torch.manual_seed(seed)
    text = library()
    encoder = pieces(text, vocabulary)
    network = model(SHAPES[shape], len(encoder), 1024).train()
    loss = train(network, texts(encoder, text, seed), steps, batch)
    # Rounded to BF16 as it will be stored; the routers' loss is over.
    network.eval().to(torch.bfloat16)
    network.config.output_router_logits = False
    made = {
        "script": "python -m tools.pretrain lines",
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "shape": asdict(SHAPES[shape]),
        "tokens": len(encoder),
        "parameters": sum(p.numel() for p in network.parameters()),
        "text": f"{len(text)} lines of the standard library of Python {sys.version.split()[0]}",
        "loss": loss,
        "sampled_of_120": accuracy(network.float(), encoder, LinesTask(LinesTask.drawn(None, 0).problems() * 8), 320),
    }
    save(out, network.to(torch.bfloat16), encoder, made)


if __name__ == "__main__":
    main()
