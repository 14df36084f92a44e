"""Faults in the code of one decoder layer of a trainer, of a given strength, and where each has to be found.

They are planted into transformers' own modules by hooks and attributes, so that the trainer's forward pass and the
wider one that its rounding is measured by have the same fault, as with a mistake in the layer's source.

Shape legend: `B` sequences, `T` tokens of the longest, `D` size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Plant = Callable[[nn.Module, float], Callable[[], None]]


@dataclass(frozen=True)
class CodeFault:
    """A fault of one kind.

    Attributes:
        name: What is wrong, for a table.
        strengths: How much; what the number is depends on the fault.
        plant: Puts it into a decoder layer, and returns what takes it out again.
        kind, place: What has to be named: of a `Located` its kind, and what follows the layer's name.
        windowed: Whether it needs a model with a sliding window.
    """

    name: str
    strengths: Sequence[float]
    plant: Plant
    kind: str
    place: str
    windowed: bool = False

    @contextmanager
    def planted(self, layer: nn.Module, strength: float) -> Iterator[None]:
        """The layer has the fault for a while."""
        restore = self.plant(layer, strength)
        try:
            yield
        finally:
            restore()


def _scaled(block: str) -> Plant:
    """The residual connection adds so many times what a block made."""

    def plant(layer: nn.Module, strength: float) -> Callable[[], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return (output[0] * strength, *output[1:]) if isinstance(output, tuple) else output * strength

        return layer.get_submodule(block).register_forward_hook(hook).remove

    return plant


def _attribute(module: str, name: str) -> Plant:
    """So many times a number that a module keeps."""

    def plant(layer: nn.Module, strength: float) -> Callable[[], None]:
        owner: Any = layer.get_submodule(module)
        before = getattr(owner, name)
        setattr(owner, name, before * strength)
        return lambda: setattr(owner, name, before)

    return plant


def _given(change: Callable[[dict[str, Any], Tensor], dict[str, Any]]) -> Plant:
    """Attention is given other keyword arguments; `change` gets them, and the hidden states."""

    def plant(layer: nn.Module, _: float) -> Callable[[], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, **change(kwargs, states)}

        return layer.get_submodule("self_attn").register_forward_pre_hook(hook, with_kwargs=True).remove

    return plant


def _rounded(dtype: torch.dtype) -> Plant:
    """Cosines and sines of the rotation are rounded to a dtype."""

    def change(kwargs: dict[str, Any], states: Tensor) -> dict[str, Any]:
        return {"position_embeddings": tuple(x.to(dtype).to(states.dtype) for x in kwargs["position_embeddings"])}

    return _given(change)


def _angles(dtype: torch.dtype) -> Plant:
    """Angles of the rotation are the product of positions and frequencies in a dtype."""

    def change(kwargs: dict[str, Any], states: Tensor) -> dict[str, Any]:
        cos = kwargs["position_embeddings"][0]
        half = cos.shape[-1] // 2
        inverse = 10_000.0 ** (-torch.arange(half) / half)
        angles = (torch.arange(cos.shape[1]).to(dtype)[:, None] * inverse.to(dtype)).float().to(cos.device)
        both = torch.cat((angles, angles), dim=-1)[None].expand_as(cos)
        return {"position_embeddings": (both.cos().to(states.dtype), both.sin().to(states.dtype))}

    return _given(change)


def _window(layer: nn.Module, strength: float) -> Callable[[], None]:
    """Attention sees so many tokens back, the token itself included; the batch has no padding."""

    def change(_: dict[str, Any], states: Tensor) -> dict[str, Any]:
        place = torch.arange(states.shape[1], device=states.device)
        back = place[:, None] - place
        return {"attention_mask": ((back >= 0) & (back < strength))[None, None]}

    return _given(change)(layer, strength)


WINDOW = 64
FAULTS = (
    CodeFault("MLP added to the residual, times", (1.003, 1.01, 1.03), _scaled("mlp"), "end", ""),
    CodeFault(
        "attention added to the residual, times",
        (1.003, 1.01, 1.03),
        _scaled("self_attn"),
        "between",
        ".post_attention_layernorm",
    ),
    CodeFault(
        "softmax scale, times", (1.003, 1.01, 1.05), _attribute("self_attn", "scaling"), "between", ".self_attn.o_proj"
    ),
    CodeFault("cosines and sines in FP16", (16,), _rounded(torch.float16), "between", ".self_attn.o_proj"),
    CodeFault("cosines and sines in BF16", (16,), _rounded(torch.bfloat16), "between", ".self_attn.o_proj"),
    CodeFault("angles of the rotation in FP16", (16,), _angles(torch.float16), "between", ".self_attn.o_proj"),
    CodeFault("angles of the rotation in BF16", (16,), _angles(torch.bfloat16), "between", ".self_attn.o_proj"),
    CodeFault(
        "window of so many tokens for 64",
        (WINDOW - 1, WINDOW + 1, WINDOW // 2),
        _window,
        "between",
        ".self_attn.o_proj",
        windowed=True,
    ),
    CodeFault(
        "epsilon of a norm, times",
        (10, 1000, 100_000),
        _attribute("input_layernorm", "variance_epsilon"),
        "module",
        ".input_layernorm",
    ),
)
