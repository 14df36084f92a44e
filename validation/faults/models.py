"""The models of the bench, their prompts and the other text that trainers are updated on.

`smollm2` is the built-in SmolLM2-135M-Instruct, `chain` the dense model that the repository trains for arithmetic.
`mixture` (Qwen3-MoE) and `absolute` (GPT-2, whose learned positions are absolute) are small character models, trained
once into a folder on the English of Python's own documentation, which every Python of a version carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mismatch_probe.engines.builtin import BUILTINS, pull

Split = Literal["dev", "test"]
ModelName = Literal["smollm2", "chain", "mixture", "absolute"]
MODELS: tuple[ModelName, ...] = ("smollm2", "chain", "mixture", "absolute")
ROOT = Path(__file__).parents[2]
CHARACTER_MODELS = ("mixture", "absolute")
_STEPS = {"mixture": 350, "absolute": 900}
_BATCH, _LONGEST = 48, 112


@dataclass(frozen=True)
class Model:
    """A model of the bench.

    Attributes:
        name: Its name in the bench.
        path: Checkpoint folder.
        bos: Id that its prompts begin with, where they do.
    """

    name: ModelName
    path: Path
    bos: int | None


def model(name: ModelName, folder: Path) -> Model:
    """A model, made on its first use.

    Args:
        name: Which.
        folder: Where the trained ones are kept.
    """
    if name == "smollm2":
        return Model(name, pull(BUILTINS["smollm2-135m"], print), None)
    if name == "chain":
        return Model(name, ROOT / "data/rl/chain", 1)
    path = folder / name
    if not (path / "made.json").exists():
        train(name, path)
    return Model(name, path, 1)


@cache
def tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


@cache
def english() -> dict[str, tuple[str, ...]]:
    """Lines of text by what they are for: `train`, and the prompts of each half."""
    from pydoc_data.topics import topics

    lines = [re.sub(r"\s+", " ", p).strip() for t in sorted(topics) for p in topics[t].split("\n\n")]
    lines = sorted({line for line in lines if len(line) > 60 and line.isascii() and line.isprintable()})
    order = np.random.default_rng(0).permutation(len(lines))
    shuffled = [lines[i] for i in order]
    # Lines 200 to 400 were the prompts of an earlier test half, whose errors have been seen.
    return {"dev": tuple(shuffled[:200]), "test": tuple(shuffled[400:600]), "train": tuple(shuffled[600:])}


@cache
def source() -> tuple[str, ...]:
    """Lines of program text: what trainers are updated on, and nobody scores."""
    import argparse
    import inspect
    import textwrap

    text = textwrap.dedent(inspect.getsource(argparse))
    lines = [line.strip() for line in text.splitlines()]
    return tuple(line for line in lines if len(line) > 30 and line.isascii() and line.isprintable())


def prompts(model: Model, split: Split, count: int, *, long: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """Names and ids of prompts; those of the halves have nothing in common.

    Args:
        model: Whose tokenizer.
        split: Half of the bench.
        count: How many; they begin anew where there are fewer.
        long: So long that responses begin near the position 200.
    """
    encode = tokenizer(model.path)
    if long:
        return [(f"long-{i:03d}", ids) for i, ids in enumerate(_long(model, split, count))]
    if model.name == "smollm2":
        lines = [json.loads(line) for line in (ROOT / "data/prompts.jsonl").read_text().splitlines()]
        mine = lines[0::2] if split == "dev" else lines[1::2]
        found = [(p["id"], tuple(encode(p["prompt"], add_special_tokens=False)["input_ids"])) for p in mine]
    elif model.name == "chain":
        from mismatch_probe.rl.tasks.arithmetic import ChainTask

        seed = {"dev": 11, "test": 13}[split]
        both = [ChainTask(40, seed, 16, free=free).problems() for free in (False, True)]
        found = [(p.problem_id, tuple(encode(p.prompt)["input_ids"])) for pair in zip(*both, strict=True) for p in pair]
    else:
        draw = np.random.default_rng({"dev": 1, "test": 5}[split])
        found = [
            (f"text-{i:03d}", (1, *encode(line[: int(draw.integers(8, 40))], add_special_tokens=False)["input_ids"]))
            for i, line in enumerate(english()[split])
        ]
    return [found[i % len(found)] for i in range(count)]


def _long(model: Model, split: Split, count: int) -> list[tuple[int, ...]]:
    draw = np.random.default_rng({"dev": 3, "test": 6}[split])
    lengths = draw.integers(150, 330, size=count)
    if model.name == "chain":
        short = [ids for _, ids in prompts(model, split, 80)]
        found = []
        for i, length in enumerate(lengths.tolist()):
            ids: list[int] = []
            while len(ids) < length:
                ids += short[int(draw.integers(len(short)))]
            found.append((*ids, *short[i % len(short)]))
        return found
    text = "".join(" " + line for line in english()[split])
    ids = tokenizer(model.path)(text, add_special_tokens=False)["input_ids"]
    starts = draw.integers(0, len(ids) - 400, size=count)
    first = () if model.bos is None else (model.bos,)
    return [
        (*first, *ids[start : start + length]) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


def environment(model: Model, index: int) -> tuple[int, ...]:
    """What an environment or tool says between two turns: ids that the model would hardly sample."""
    if model.name == "smollm2":
        words = (
            "\nTool: [{n}, {m}] ok={k}\nAssistant:",
            "\n<result>{m}-{n} %{k}</result>\n",
            "\nUSER >> {k}:{n};{m}\n",
        )
        text = words[index % 3].format(n=index * 37 % 101, m=index * 61 % 89, k=index * 17 % 13)
        return tuple(tokenizer(model.path)(text, add_special_tokens=False)["input_ids"])
    vocabulary = 32 if model.name == "chain" else 100
    return tuple(np.random.default_rng((7, index)).integers(4, vocabulary - 2, size=10).tolist())


def updates(model: Model, seed: int, batch: int = 8, length: int = 96) -> Any:
    """Endless batches `[B, L]` of ids of other text, as the network's `input_ids` and `labels`."""
    import torch

    rng = np.random.default_rng((seed, 0xB0))
    encode = tokenizer(model.path)
    if model.name == "chain":
        from mismatch_probe.rl.tasks.arithmetic import Calculation

        while True:
            rows = []
            for _ in range(4 * batch):
                # Longer problems whose operands are only copied: another task in the same alphabet.
                calculation = Calculation.draw(rng, 12)
                steps = zip(calculation.operators, calculation.digits, strict=True)
                said = ",".join(f"{o}{d}" * int(rng.integers(1, 3)) for o, d in steps)
                rows.append([*encode(calculation.text)["input_ids"], *encode(said)["input_ids"][1:], 2][:length])
            yield _padded(rows)
    lines = source()
    if model.name == "smollm2":
        text = "\n".join(lines)
        ids = torch.tensor(encode(text, add_special_tokens=False)["input_ids"])
        while True:
            starts = rng.integers(0, len(ids) - length, size=batch).tolist()
            block = torch.stack([ids[start : start + length] for start in starts])
            yield block, block.clone()
    while True:
        chosen = [lines[i] for i in rng.integers(len(lines), size=4 * batch).tolist()]
        yield _padded([[1, *encode(c, add_special_tokens=False)["input_ids"], 2][:length] for c in chosen])


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, ids.masked_fill(torch.arange(longest) >= torch.tensor([len(row) for row in rows])[:, None], -100)


def _untrained(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen3MoeConfig

    from tests.real.tiny import EXPERTS, GPT2

    torch.manual_seed(0)
    if name == "mixture":
        sizes = {**EXPERTS, "num_hidden_layers": 4, "moe_intermediate_size": 128, "initializer_range": 0.02}
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, tie_word_embeddings=True))
    return AutoModelForCausalLM.from_config(
        GPT2Config(**{**GPT2, "n_layer": 4, "initializer_range": 0.02}, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def train(name: str, folder: Path) -> None:
    """Trains a character model: a line per row, from `<s>` to `</s>`."""
    import torch

    from tests.real.tiny import save_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    network, encode, rng = _untrained(name).train(), tokenizer(folder), np.random.default_rng(0)
    lines = [[1, *encode(line, add_special_tokens=False)["input_ids"], 2] for line in english()["train"]]
    steps = _STEPS[name]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        chosen = [lines[i] for i in rng.integers(len(lines), size=_BATCH).tolist()]
        # Some begin in the middle of a line, so that a row ends before its last position often enough.
        cut = [row[:1] + row[-int(rng.integers(20, _LONGEST)) :] for row in chosen]
        ids, labels = _padded([row[:_LONGEST] for row in cut])
        loss = network(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"{name}: step {step}, loss {float(loss):.3f}", flush=True)
    network.eval().save_pretrained(folder)
    (folder / "made.json").write_text(json.dumps({"steps": steps, "loss": float(loss)}) + "\n")
