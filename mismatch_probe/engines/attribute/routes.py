"""The trainer's routers: which experts they choose, and the engine's choice put in the place of theirs.

A router of transformers answers with (logits, weights, indices). What makes weights out of logits differs between
architectures, so it is found by trying: the rule that gives a router's own weights from its own logits and indices.

Shape legend: `N` tokens of a pass, `E` experts, `K` experts of a token, `L` layers with a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mismatch_probe.engines.attribute.changes import modules_of
from mismatch_probe.engines.attribute.variants import UNKNOWN, NotThereError
from mismatch_probe.engines.audit.places import Network, is_router

Rule = Callable[[Tensor, Tensor], Tensor]


def _softmax(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.float().softmax(-1).gather(1, indices)


def _sigmoid(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.float().sigmoid().gather(1, indices)


def _normalised(rule: Rule) -> Rule:
    def call(logits: Tensor, indices: Tensor) -> Tensor:
        weights = rule(logits, indices)
        return weights / weights.sum(-1, keepdim=True)

    return call


# A softmax over the chosen ones alone is the normalised softmax.
_RULES: tuple[Rule, ...] = (_softmax, _normalised(_softmax), _sigmoid, _normalised(_sigmoid))


class Routing:
    """What every router chose in one forward pass, and what it shall choose instead.

    Args:
        model: A causal language model of transformers.
        chosen: Experts of a token.
    """

    def __init__(self, model: Any, chosen: int) -> None:
        names = Network.of(model).layers
        self._routers: dict[int, Any] = {}
        for index, layer in enumerate(modules_of(model, names)):
            for name, module in layer.named_modules():
                if is_router(name):
                    self._routers.setdefault(index, module)
        if not self._routers:
            raise NotThereError("the model has no routers")
        self._chosen = chosen
        self._wanted: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    @property
    def layers(self) -> Sequence[int]:
        """Indices of the layers that have a router."""
        return tuple(self._routers)

    @contextmanager
    def watching(self) -> Iterator[Routing]:
        """Routers answer through this for the while; `seen` has `[N, K]` indices by layer, of the last pass."""
        handles = [router.register_forward_hook(self._after(layer)) for layer, router in self._routers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def choose(self, wanted: dict[int, Tensor]) -> None:
        """From now on: by layer `[N, K]` indices of the next pass's tokens, `UNKNOWN` where a token keeps its own."""
        self._wanted = wanted

    def _after(self, layer: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            at, indices = self._parts(output)
            self.seen[layer] = indices.detach()
            wanted = self._wanted.get(layer)
            if wanted is None:
                return None
            logits, weights = output[0], output[at[0]]
            rule = _rule(logits, weights, indices)
            routes = torch.where(wanted == UNKNOWN, indices, wanted)
            changed = list(output)
            changed[at[0]], changed[at[1]] = rule(logits, routes).to(weights.dtype), routes
            return tuple(changed)

        return hook

    def _parts(self, output: Any) -> tuple[tuple[int, int], Tensor]:
        """Where weights and indices lie in a router's answer, and the indices.

        Raises:
            NotThereError: It is built in another way.
        """
        parts = list(output) if isinstance(output, tuple) else []
        shaped = [
            i for i, t in enumerate(parts) if i and isinstance(t, Tensor) and t.ndim == 2 and t.shape[1] == self._chosen
        ]
        indices = [i for i in shaped if not parts[i].is_floating_point()]
        weights = [i for i in shaped if parts[i].is_floating_point()]
        if len(indices) != 1 or len(weights) != 1:
            raise NotThereError("the routers do not return logits, weights and indices")
        return (weights[0], indices[0]), parts[indices[0]]


def _rule(logits: Tensor, weights: Tensor, indices: Tensor) -> Rule:
    """How the router made its weights.

    Raises:
        NotThereError: In no way that is known.
    """
    close = 8 * torch.finfo(weights.dtype).eps
    for rule in _RULES:
        if (rule(logits, indices) - weights.float()).abs().max() <= close:
            return rule
    raise NotThereError("the router's weighting of experts is not supported")
