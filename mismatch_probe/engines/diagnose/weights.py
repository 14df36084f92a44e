"""Other weights on a trainer's model: an adapter merged by hand, layers of another checkpoint, rounded projections.

Shape legend: `O` outputs, `I` inputs, `r` rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mismatch_probe.engines.attribute.variants import NotThereError
from mismatch_probe.engines.audit.places import layer_of
from mismatch_probe.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

_GROUP = 32
_PREFIX = "base_model.model."


def _projections(model: Any) -> dict[str, nn.Parameter]:
    """Matrices inside of decoder layers, by name; experts that are stacked count, too."""
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2 and layer_of(name) is not None}


@contextmanager
def _replaced(parameters: dict[str, nn.Parameter], new: Any) -> Iterator[None]:
    """Parameters with other values for the while; `new` makes a tensor of a name and the old one."""
    before = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = new(name, p.data)
        yield
    finally:
        for name, p in parameters.items():
            p.data = before[name]


@contextmanager
def quantised(model: Any, kind: str) -> Iterator[None]:
    """Projections rounded to nearest: `int8` and `fp8` by row, `int4` in groups of 32 of a row."""
    parameters = _projections(model)
    if not parameters:
        raise NotThereError("the decoder layers were not found")
    with _replaced(parameters, lambda _, value: rounded_to(value, kind)):
        yield


def rounded_to(weight: Tensor, kind: str) -> Tensor:
    """A matrix `[…, O, I]` as a quantised one holds it, in its own dtype."""
    import torch

    wide = weight.float()
    if kind == "fp8":
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
    levels = {"int8": 127, "int4": 7}[kind]
    width = _GROUP if kind == "int4" and wide.shape[-1] % _GROUP == 0 else wide.shape[-1]
    blocks = wide.reshape(*wide.shape[:-1], -1, width)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    return ((blocks / scale).round().clamp(-levels, levels) * scale).reshape(weight.shape).to(weight.dtype)


@contextmanager
def donated(model: Any, donor: str, layers: tuple[int, int]) -> Iterator[None]:
    """Some layers with the weights of another checkpoint of the same shape."""
    from mismatch_probe.engines.loading import load_model

    own = {n: p for n, p in model.named_parameters() if (i := layer_of(n)) is not None and layers[0] <= i < layers[1]}
    theirs = dict(load_model(donor, dtype=model.dtype).named_parameters())
    if not own or any(name not in theirs or theirs[name].shape != p.shape for name, p in own.items()):
        raise NotThereError("the checkpoints have other layers")
    with _replaced(own, lambda name, value: theirs[name].data.to(value)):
        yield


def merge_adapter(model: Any, folder: str) -> None:
    """Adds a LoRA adapter of PEFT to a model's weights: W + s·B·A, with s = α/r, or α/√r with `use_rslora`.

    Args:
        model: Of transformers.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelError: It is no LoRA adapter of this model.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    fix = "Give a folder of PEFT with a LoRA adapter of this model."
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "adapter_model.safetensors")
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The adapter {folder} cannot be read ({type(error).__name__}: {error}).", fix) from error
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ModelError(f"The adapter {folder} has DoRA or ranks by module, which are not merged here.", fix)
    parameters = dict(model.named_parameters())
    done = 0
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        place = name.removeprefix(_PREFIX).partition(".lora_A.")[0]
        up, weight = tensors[name.replace(".lora_A.", ".lora_B.")], parameters.get(f"{place}.weight")
        delta = scale * (up.float() @ down.float())  # `[O, r] · [r, I]`
        if config.get("fan_in_fan_out"):
            delta = delta.T
        if weight is None or weight.shape != delta.shape:
            raise ModelError(f"The adapter {folder} changes {place}, which the model has not.", fix)
        weight.data = (weight.data.float() + delta.to(weight.device)).to(weight.dtype)
        done += 1
    if not done:
        raise ModelError(f"The adapter {folder} has no LoRA weights.", fix)
