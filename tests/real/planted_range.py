"""Tiny models whose numbers leave FP16 in a known place: forward, backward, and in the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.real.planted import change_weights

Weights = dict[str, torch.Tensor]
LAYER = "model.layers.1"


def plant_outlier(checkpoint: Path, folder: Path, sequences: list[list[int]], peak: float) -> Path:
    """One channel of a layer's MLP output is as large as `peak` on these sequences."""
    name = f"{LAYER}.mlp.down_proj.weight"

    def change(weights: Weights) -> None:
        found = _largest(checkpoint, f"{LAYER}.mlp.down_proj", sequences, channel=5)
        weights[name][5] *= peak / found

    return change_weights(checkpoint, folder, change)


def plant_steep_backward(checkpoint: Path, folder: Path, *, flat: bool = False) -> Path:
    """A layer's MLP product is small and its projection large, so that the gradient of the product is large while every
    activation stays small. With `flat` another layer's attention gets gradients that are as much too small.
    """

    def change(weights: Weights) -> None:
        weights[f"{LAYER}.mlp.up_proj.weight"] *= 2.0**-11
        weights[f"{LAYER}.mlp.down_proj.weight"] *= 2.0**11
        if flat:
            weights["model.layers.2.self_attn.o_proj.weight"] *= 2.0**-9
            weights["model.layers.2.self_attn.q_proj.weight"] *= 2.0**-12

    return change_weights(checkpoint, folder, change)


def plant_subnormal(checkpoint: Path, folder: Path) -> Path:
    """A weight tensor below FP16's smallest normal number."""

    def change(weights: Weights) -> None:
        weights[f"{LAYER}.self_attn.v_proj.weight"] *= 2.0**-19

    return change_weights(checkpoint, folder, change)


def plant_broken(checkpoint: Path, folder: Path, value: float) -> Path:
    """A weight that is not finite, or so large that FP32 itself overflows behind it."""

    def change(weights: Weights) -> None:
        weights[f"{LAYER}.mlp.down_proj.weight"][3] = value

    return change_weights(checkpoint, folder, change)


def plant_large_scores(checkpoint: Path, folder: Path) -> Path:
    """Attention whose products q·k leave FP16, while nothing that a module makes does."""

    def change(weights: Weights) -> None:
        for side in ("q_proj", "k_proj"):
            weights[f"{LAYER}.self_attn.{side}.weight"] *= 60.0

    return change_weights(checkpoint, folder, change)


def _largest(checkpoint: Path, module: str, sequences: list[list[int]], channel: int) -> float:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found: list[float] = []
    hook: Callable[..., None] = lambda _, __, output: found.append(float(output[..., channel].abs().max()))  # noqa: E731
    handle = model.get_submodule(module).register_forward_hook(hook)
    with torch.inference_mode():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    handle.remove()
    return max(found)
