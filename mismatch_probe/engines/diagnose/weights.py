"""Other weights on a trainer's model: an adapter merged by hand, layers of another checkpoint, rounded projections.

Shape legend: `O` outputs, `I` inputs, `r` rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
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
def changed(model: Any, kind: str, value: float, layers: tuple[int, int], donor: str | None) -> Iterator[None]:
    """A model with other weights for the while.

    Args:
        model: Of transformers.
        kind: Of `KINDS`, or a format of `rounded_to`.
        value: The factor of `blended`.
        layers: Which layers, as (first, last + 1), of what changes some.
        donor: Checkpoint folder that `donated` and `blended` read.

    Raises:
        NotThereError: The model has no such weights.
    """
    if kind in _DONATED:
        assert donor is not None
        theirs = _checkpoint(donor, model.dtype)
        own = dict(model.named_parameters()) if kind == "blended" else _within(model, layers)
        if not own or any(name not in theirs or theirs[name].shape != p.shape for name, p in own.items()):
            raise NotThereError("the checkpoints have other layers")
        new = {name: _DONATED[kind](theirs[name].data.to(p.data), p.data, value) for name, p in own.items()}
    elif kind in KINDS:
        own = _within(model, layers)
        new = KINDS[kind](own, layers[0])
    else:
        own = _projections(model)
        new = {name: rounded_to(p.data, kind) for name, p in own.items()}
    if not new:
        raise NotThereError("the decoder layers have no such weights")
    with _replaced({name: own[name] for name in new}, lambda name, _: new[name]):
        yield


@lru_cache(maxsize=1)
def _checkpoint(path: str, dtype: Any) -> dict[str, nn.Parameter]:
    from mismatch_probe.engines.loading import load_model

    return dict(load_model(path, dtype=dtype).named_parameters())


def _within(model: Any, layers: tuple[int, int]) -> dict[str, nn.Parameter]:
    """Weights of some layers."""
    numbers = ((name, p, layer_of(name)) for name, p in model.named_parameters())
    return {name: p for name, p, layer in numbers if layer is not None and layers[0] <= layer < layers[1]}


def _swapped(own: dict[str, nn.Parameter], first: int) -> dict[str, Tensor]:
    """Two layers that follow each other, exchanged."""
    here, there = f".{first}.", f".{first + 1}."
    found = {}
    for name in own:
        other = name.replace(here, there, 1) if layer_of(name) == first else name.replace(there, here, 1)
        if other not in own or own[other].shape != own[name].shape:
            raise NotThereError("neighbouring layers differ in shape")
        found[name] = own[other].data
    return found


def _keys_and_values(own: dict[str, nn.Parameter], _: int) -> dict[str, Tensor]:
    """Projections of keys and of values, exchanged."""
    pairs = [(name, name.replace(".k_proj.", ".v_proj.")) for name in own if ".k_proj." in name]
    return {a: own[b].data for pair in pairs for a, b in (pair, pair[::-1])}


def _experts(own: dict[str, nn.Parameter], _: int) -> dict[str, Tensor]:
    """Experts by one place on, the router as it is."""
    return {name: p.data.roll(-1, 0) for name, p in own.items() if ".experts." in name and p.ndim == 3}


KINDS: dict[str, Callable[[dict[str, nn.Parameter], int], dict[str, Tensor]]] = {
    "swapped": _swapped,
    "keys-values": _keys_and_values,
    "experts": _experts,
}
"""Weights in each other's place."""
_DONATED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "donated": lambda theirs, _, __: theirs,
    "blended": lambda theirs, own, factor: (theirs.float() + factor * (own.float() - theirs.float())).to(own.dtype),
}


def rounded_to(weight: Tensor, kind: str) -> Tensor:
    """A matrix `[…, O, I]` as a quantised one holds it, in its own dtype."""
    import torch

    wide = weight.float()
    if kind == "fp8":
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
    levels = 127 if kind == "int8" else 7
    width = _GROUP if kind == "int4" and wide.shape[-1] % _GROUP == 0 else wide.shape[-1]
    blocks = wide.reshape(*wide.shape[:-1], -1, width)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    return ((blocks / scale).round().clamp(-levels, levels) * scale).reshape(weight.shape).to(weight.dtype)


def merge_adapter(model: Any, folder: str) -> None:
    """Adds a LoRA adapter of PEFT to a model's weights: W + s·B·A, with s = α/r, or α/√r with `use_rslora`.

    Args:
        model: Of transformers.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelError: Not a LoRA adapter of this model.
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
