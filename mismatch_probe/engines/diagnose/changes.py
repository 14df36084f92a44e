"""One change of a trainer's forward pass, as data, and how it is made on the model. torch is imported where it is made.

Shape legend: `H` half the width of a head that rotates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mismatch_probe.engines.attribute.variants import NotThereError
from mismatch_probe.types import ScoreRequest

if TYPE_CHECKING:
    from torch import Tensor

    from mismatch_probe.engines.base import TrainerEngine


@dataclass(frozen=True)
class ForwardChange:
    """A forward pass that differs from the plain one.

    Attributes:
        name: Unique.
        layout: Of `hf.layouts.BatchLayout`; empty for the trainer's own.
        groups: Sequences that share a batch or a packed row, in order; none for batches as they fit memory.
        before: Ids in front of every prompt.
        dropped: Ids that are missing at the beginning of every prompt.
        kind: What is changed in the network, of `KINDS` or `weights.KINDS`; empty for nothing.
        value: How much.
        layers: Which layers, as (first, last + 1), where only some are changed.
    """

    name: str
    layout: str = ""
    groups: tuple[tuple[int, ...], ...] = ()
    before: tuple[int, ...] = ()
    dropped: int = 0
    kind: str = ""
    value: float = 0.0
    layers: tuple[int, int] = (0, 0)

    def seen(self, request: ScoreRequest) -> ScoreRequest:
        """A sequence as the model sees it."""
        prompt = [*self.before, *list(request.prompt_token_ids)[self.dropped :]]
        if not prompt:
            raise NotThereError("a prompt has no other token")
        return replace(request, prompt_token_ids=prompt)


def applied(engine: TrainerEngine, change: ForwardChange, donor: str | None) -> AbstractContextManager[None]:
    """The engine's model with a change, for the while.

    Raises:
        NotThereError: The model has nothing that could be changed so.
    """
    from mismatch_probe.engines.diagnose import weights

    model: Any = engine.run_on_model(lambda model: model)
    if not change.kind:
        return nullcontext()
    if change.kind in KINDS:
        return KINDS[change.kind](model, change.value)
    return weights.changed(model, change.kind, change.value, change.layers, donor)


@contextmanager
def _handles(handles: Sequence[Any]) -> Iterator[None]:
    """Hooks that are taken off at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(modules: Sequence[Any], change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Modules whose output is changed."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return _handles([module.register_forward_hook(hook) for module in modules])


def _positions(change: Callable[[Tensor, float], Tensor], model: Any, value: float) -> AbstractContextManager[None]:
    """Position ids changed where rotary tables are made."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": change(kwargs["position_ids"], value)}
        return (args[0], change(args[1], value), *args[2:]), kwargs

    return _handles([_rotary(model).register_forward_pre_hook(hook, with_kwargs=True)])


def _bfloat16(positions: Tensor, _: float) -> Tensor:
    return positions.bfloat16().float()


def _clipped(positions: Tensor, most: float) -> Tensor:
    return positions.clamp(max=int(most))


def _halved(positions: Tensor, edge: float) -> Tensor:
    return positions.float() - (positions.float() - int(edge)).clamp(min=0) / 2


def _rotary(model: Any) -> Any:
    found = [m for m in model.modules() if hasattr(m, "inv_freq") and "rotary" in type(m).__name__.lower()]
    if len(found) != 1:
        raise NotThereError("the model has no single module of rotary frequencies")
    return found[0]


def _base(before: Tensor, base: float, _: float) -> Tensor:
    import torch

    return float(base) ** (-torch.arange(len(before), dtype=torch.float64) / len(before))


def _lost(before: Tensor, _: float, __: float) -> Tensor:
    return before * 0 + 1


def _divided(before: Tensor, factor: float, _: float) -> Tensor:
    return before / factor


def _yarn(part: int, before: Tensor, factor: float, longest: float) -> Tensor:
    """YaRN: frequencies that turn once or less within the trained length are divided, from 32 turns on they are not.

    The trained length is a part of what the configuration says.
    """
    turns = longest / part * before / (2 * math.pi)
    keep = ((turns - 1) / 31).clamp(0, 1)
    return before * (keep + (1 - keep) / factor)


@contextmanager
def _rope(change: Callable[[Tensor, float, float], Tensor], model: Any, value: float) -> Iterator[None]:
    """Other rotary frequencies `[H]`."""
    import torch

    rotary = _rotary(model)
    before = rotary.inv_freq
    longest = float(model.config.get_text_config().max_position_embeddings)
    new = change(before.double().cpu(), value, longest)
    if torch.allclose(new, before.double().cpu(), rtol=1e-4):
        raise NotThereError("these are the model's own frequencies")
    rotary.inv_freq = new.to(before)
    try:
        yield
    finally:
        rotary.inv_freq = before


def _window(model: Any, width: float) -> AbstractContextManager[None]:
    """Attention that sees the last `width` tokens."""
    import torch

    def narrow(query: Tensor, mask: Tensor | None) -> Tensor:
        n = query.shape[2]
        at = torch.arange(n, device=query.device)
        allowed = (at[:, None] >= at) & (at[:, None] - at < width)
        if mask is None:
            return allowed[None, None]
        return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)

    def changed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            return function(module, query, key, value, narrow(query, mask), *args, **kwargs)

        return call

    return _attention(model, changed)


def _sink(model: Any, logit: float) -> AbstractContextManager[None]:
    """Attention whose softmax has one more logit, whose value is zero."""
    import torch

    def changed(_: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            n, groups = query.shape[2], query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scores = query @ key.transpose(2, 3) * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
            causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()[None, None]
            allowed = causal if mask is None else mask if mask.dtype == torch.bool else mask >= 0
            scores = scores.float().masked_fill(~allowed, -torch.inf)
            wider = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), logit)], -1)
            share = wider.softmax(-1)[..., :-1].to(value.dtype)
            return (share @ value).transpose(1, 2).contiguous(), None

        return call

    return _attention(model, changed)


def _attention(model: Any, change: Callable[..., Any]) -> AbstractContextManager[None]:
    from mismatch_probe.engines.attribute.changes import attention_changed

    if model.config._attn_implementation != "sdpa":
        raise NotThereError("attention is not SDPA")
    return attention_changed(model, change)


def _cap(model: Any, most: float) -> AbstractContextManager[None]:
    """Logits softly capped."""
    return _outputs([model.get_output_embeddings()], lambda x: most * (x.float() / most).tanh())


def _mantissa(model: Any, bits: float) -> AbstractContextManager[None]:
    """The stream between layers with so many explicit bits of mantissa, to nearest."""
    import torch

    from mismatch_probe.engines.attribute.changes import modules_of
    from mismatch_probe.engines.audit.places import Network

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x.float())
        scale = 2.0 ** (bits + 1)
        return torch.ldexp((mantissa * scale).round() / scale, exponent).to(x.dtype)

    return _outputs(modules_of(model, Network.of(model).layers), rounded)


def _dropout(model: Any, rate: float) -> AbstractContextManager[None]:
    """Dropout of what every MLP gives."""
    import torch

    from mismatch_probe.engines.attribute.changes import mlp_blocks

    torch.manual_seed(0)
    return _outputs(mlp_blocks(model), lambda x: torch.nn.functional.dropout(x, rate))


KINDS: dict[str, Callable[[Any, float], AbstractContextManager[None]]] = {
    "positions-bfloat16": partial(_positions, _bfloat16),
    "positions-clipped": partial(_positions, _clipped),
    "positions-halved": partial(_positions, _halved),
    "rope-base": partial(_rope, _base),
    "rope-lost": partial(_rope, _lost),
    "rope-divided": partial(_rope, _divided),
    "rope-yarn": partial(_rope, partial(_yarn, 1)),
    "rope-yarn-2": partial(_rope, partial(_yarn, 2)),
    "rope-yarn-4": partial(_rope, partial(_yarn, 4)),
    "window": _window,
    "sink": _sink,
    "logit-cap": _cap,
    "mantissa": _mantissa,
    "dropout": _dropout,
}
"""Changes of the network that leave weights alone."""
