"""Where in a network a tensor is made: by module names and classes, as transformers builds causal language models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_LAYER = re.compile(r"\.(\d+)(\.|$)")
_PRODUCT = re.compile(r"(^|\.)(down_proj|fc2|fc_out|dense_4h_to_h|w2|c_proj)$")
_MLP = re.compile(r"mlp|ffn|feed_forward|expert|fc2|fc_out", re.IGNORECASE)
_ROUTER = re.compile(r"(^|\.)(gate|router)$")
_EXPERTS = re.compile(r"experts$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def layer_index(layers: Sequence[str], name: str) -> int | None:
    """Index, among named layers, of the one that a module is or lies in; None outside of them."""
    return next((i for i, layer in enumerate(layers) if name == layer or name.startswith(f"{layer}.")), None)


def layer_of(name: str) -> int | None:
    """Index of the decoder layer in a module's or a weight's name, None outside of them."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Place:
    """A tensor of a forward pass.

    Attributes:
        name: The module's name, with what of it in parentheses where it is not its output.
        kind: `residual`, `softmax input`, `attention product`, `mlp product`, `router logits`, `logits` or `other`.
        layer: Index of the decoder layer, None outside of them.
        placed: Whether its peaks belong to tokens; those of fused experts, whose rows are sorted by expert, do not.
    """

    name: str
    kind: str
    layer: int | None
    placed: bool = True

    @classmethod
    def of(cls, name: str, kind: str = "other") -> Place:
        return cls(name, kind, layer_of(name))


@dataclass(frozen=True)
class Network:
    """The modules of a causal language model that stand out.

    Attributes:
        layers: Names of the decoder layers, in order.
        embedding, head: Names of the input embedding and of the head.
    """

    layers: tuple[str, ...]
    embedding: str
    head: str

    @classmethod
    def of(cls, model: Any) -> Network:
        """Reads a model: its decoder layers are the longest list of modules of one class, as all decoders have it."""
        from torch import nn

        names = {id(module): name for name, module in model.named_modules()}
        decoder = model.get_decoder()
        lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
        count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        layers = next((found for found in lists if len(found) == count), nn.ModuleList())
        head = model.get_output_embeddings()
        return cls(
            tuple(names[id(layer)] for layer in layers),
            names.get(id(model.get_input_embeddings()), ""),
            "" if head is None else names[id(head)],
        )

    def output(self, name: str) -> Place:
        """The output of a module."""
        if name in self.layers or name == self.embedding:
            return Place.of(name, "residual")
        if name == self.head:
            return Place.of(name, "logits")
        return Place.of(name, "router logits" if is_router(name) else "other")

    def input(self, name: str, module: nn.Module) -> Place | None:
        """The input of a module, where no module makes it: a product of the MLP, a sum in the stream."""
        from torch import nn

        if isinstance(module, nn.Linear) and _PRODUCT.search(name) and _MLP.search(name):
            return Place.of(f"{name} (input)", "mlp product")
        parent = name.rpartition(".")[0]
        if is_norm(module) and parent in self.layers:
            return Place.of(f"{name} (input)", "residual")
        return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class."""
    return "norm" in type(module).__name__.lower()


def is_router(name: str) -> bool:
    """Whether a module's name is that of a router of experts."""
    return bool(_ROUTER.search(name))


def is_attention(name: str) -> bool:
    """Whether a module's name is that of an attention block."""
    return bool(_ATTENTION.search(name.rpartition(".")[2]))


def runs_experts(name: str) -> bool:
    """Whether a module holds all experts of a layer as one, whose products no module of their own makes."""
    return bool(_EXPERTS.search(name))
