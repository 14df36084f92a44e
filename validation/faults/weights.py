"""Other weights than the checkpoint's, by a name that says how they are made.

A name is a list of changes, from left to right, joined by `|`; the empty name is the checkpoint itself.

    upd:LR:N          N updates by AdamW on other text, kept as a checkpoint
    lora:RANK:SIZE    a low-rank delta of that relative size on every projection
    merge:RANK:SIZE:N a low-rank delta, merged into BF16 weights and taken out again N times, then merged
    noise:SIZE:SEED   Gaussian noise of that relative size
    int8, int4, int4row, fp8   round to nearest: by row, in groups of 32, by row, by row
    old:FROM:TO       the layers FROM…TO−1 as the checkpoint has them
    lost:FROM:TO      their second projection of the MLP zero: never loaded
    swap:A:B          two layers for each other
    keys:A            keys and values of a layer for each other
    experts:A         the experts of layer A and above by one place on
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from validation.faults.models import Model, updates

Weights = dict[str, Tensor]
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@lru_cache(maxsize=2)
def checkpoint(path: Path) -> Weights:
    """Tensors of a folder by their names on disk, FP32, with the head by its own name where it is tied: an engine that
    packs its head would keep the old one.
    """
    from safetensors.torch import load_file

    found = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    if "model.embed_tokens.weight" in found:
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


def trained_path(folder: Path, model: Model, rate: str, count: int) -> Path:
    """Where the checkpoint after `count` updates is kept."""
    return folder / "weights" / model.name / f"upd-{rate}-{count}"


def trained(folder: Path, model: Model, rate: str, count: int) -> Path:
    """The checkpoint after `count` updates; all up to it are made at once."""
    path = trained_path(folder, model, rate, count)
    if not (path / "model.safetensors").exists():
        _train(folder, model, rate, max(count, 4))
    return path


def _train(folder: Path, model: Model, rate: str, count: int) -> None:
    from mismatch_probe.engines.loading import load_model

    torch.manual_seed(0)
    network = load_model(str(model.path), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=float(rate), betas=(0.9, 0.99), weight_decay=0.0)
    batches = updates(model, 1, batch=6 if model.name == "smollm2" else 8)
    for step in range(1, count + 1):
        ids, labels = next(batches)
        network(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        target = trained_path(folder, model, rate, step)
        if not (target / "model.safetensors").exists():
            network.save_pretrained(target)


def tensors(folder: Path, model: Model, name: str) -> Weights:
    """The weights of a name, FP32, by the names of a checkpoint, whole."""
    base = checkpoint(model.path)
    found = dict(base)
    for change in filter(None, name.split("|")):
        kind, *numbers = change.split(":")
        if kind == "upd":
            found = dict(checkpoint(trained(folder, model, numbers[0], int(numbers[1]))))
        else:
            found = _CHANGES[kind](found, base, [float(n) for n in numbers])
    if "lm_head.weight" in found and torch.equal(base["lm_head.weight"], base["model.embed_tokens.weight"]):
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def save(folder: Path, model: Model, name: str, target: Path) -> None:
    """Writes the weights of a name as a checkpoint with its tokenizer, FP32."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(model.path, target, ignore=shutil.ignore_patterns("*.safetensors", "made.json"))
    found = tensors(folder, model, name)
    save_file({key: value.contiguous().clone() for key, value in found.items()}, target / "model.safetensors")


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else -1


def _matrices(weights: Mapping[str, Tensor]) -> list[str]:
    """The projections inside of layers."""
    return [name for name, tensor in weights.items() if tensor.ndim == 2 and _layer(name) >= 0]


def _drawn(shape: Any, seed: int, index: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + index))


def _deltas(weights: Weights, rank: int, size: float) -> Weights:
    found = {}
    for index, name in enumerate(_matrices(weights)):
        weight = weights[name]
        delta = _drawn((weight.shape[0], rank), 1, index) @ _drawn((rank, weight.shape[1]), 2, index)
        found[name] = delta * (size * weight.norm() / delta.norm())
    return found


def _lora(weights: Weights, _: Weights, n: list[float]) -> Weights:
    return weights | {name: weights[name] + delta for name, delta in _deltas(weights, int(n[0]), n[1]).items()}


def _merge(weights: Weights, _: Weights, n: list[float]) -> Weights:
    found = dict(weights)
    for name, delta in _deltas(weights, int(n[0]), n[1]).items():
        weight = weights[name].bfloat16()
        for cycle in range(int(n[2])):
            # Adapters change between two merges, so their rounding is never the same.
            now = delta * (1 + 0.3 * torch.sin(torch.tensor(float(cycle))))
            weight = ((weight.float() + now).bfloat16().float() - now).bfloat16()
        found[name] = weight.float() + delta
    return found


def _noise(weights: Weights, _: Weights, n: list[float]) -> Weights:
    found = dict(weights)
    for index, name in enumerate(_matrices(weights)):
        drawn = _drawn(weights[name].shape, 10 + int(n[1]), index)
        found[name] = weights[name] + drawn * (n[0] * weights[name].norm() / drawn.norm())
    return found


def _integers(levels: int, group: int) -> Any:
    def change(weights: Weights, _: Weights, __: list[float]) -> Weights:
        found = dict(weights)
        for name in _matrices(weights):
            weight = weights[name]
            blocks = weight.reshape(-1, group or weight.shape[1])
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
            found[name] = ((blocks / scale).round().clamp(-levels, levels) * scale).reshape(weight.shape)
        return found

    return change


def _fp8(weights: Weights, _: Weights, __: list[float]) -> Weights:
    found = dict(weights)
    for name in _matrices(weights):
        weight = weights[name]
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        found[name] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    return found


def _old(weights: Weights, base: Weights, n: list[float]) -> Weights:
    return weights | {name: base[name] for name in weights if n[0] <= _layer(name) < n[1]}


def _lost(weights: Weights, _: Weights, n: list[float]) -> Weights:
    lost = [name for name in weights if n[0] <= _layer(name) < n[1] and "down_proj" in name]
    return weights | {name: torch.zeros_like(weights[name]) for name in lost}


def _swap(weights: Weights, _: Weights, n: list[float]) -> Weights:
    other = {int(n[0]): int(n[1]), int(n[1]): int(n[0])}
    found = dict(weights)
    for name in weights:
        layer = _layer(name)
        if layer in other:
            found[name] = weights[name.replace(f".{layer}.", f".{other[layer]}.", 1)]
    return found


def _keys(weights: Weights, _: Weights, n: list[float]) -> Weights:
    found = dict(weights)
    for name in weights:
        if _layer(name) == n[0] and ".k_proj." in name:
            other = name.replace(".k_proj.", ".v_proj.")
            found[name], found[other] = weights[other], weights[name]
    return found


def _experts(weights: Weights, _: Weights, n: list[float]) -> Weights:
    found, count = dict(weights), 1 + max(int(m.group(1)) for w in weights if (m := re.search(r"experts\.(\d+)\.", w)))
    for name in weights:
        place = re.search(r"experts\.(\d+)\.", name)
        if place and _layer(name) >= n[0]:
            moved = f"experts.{(int(place.group(1)) + 1) % count}."
            found[name] = weights[name.replace(place.group(0), moved)]
    return found


_CHANGES: dict[str, Any] = {
    "lora": _lora,
    "merge": _merge,
    "noise": _noise,
    "int8": _integers(127, 0),
    "int4": _integers(7, 32),
    "int4row": _integers(7, 0),
    "fp8": _fp8,
    "old": _old,
    "lost": _lost,
    "swap": _swap,
    "keys": _keys,
    "experts": _experts,
}
