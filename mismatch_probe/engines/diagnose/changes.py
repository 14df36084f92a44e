"""One change of a trainer's forward pass, as data, and how it is made on the model. torch is imported where it is made.

Shape legend: `H` half the width of a head that rotates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
        random: Modules in train mode, so that dropout is on.
        positions: `bfloat16` for position ids rounded to it.
        rope: `lost`, `linear:F`, `ntk:F` or `theta:X`: other rotary frequencies.
        weights: `int8`, `int4` or `fp8`: projections rounded to it, by row, or in groups of 32.
        kv_fp8: Keys and values through FP8.
        window: Tokens back that attention sees; 0 for all.
        donated: Layers that come from the donor's checkpoint, as (first, last + 1); None for none.
    """

    name: str
    layout: str = ""
    groups: tuple[tuple[int, ...], ...] = ()
    before: tuple[int, ...] = ()
    dropped: int = 0
    random: bool = False
    positions: str = ""
    rope: str = ""
    weights: str = ""
    kv_fp8: bool = False
    window: int = 0
    donated: tuple[int, int] | None = None

    def seen(self, request: ScoreRequest) -> ScoreRequest:
        """A sequence as the model sees it."""
        prompt = [*self.before, *list(request.prompt_token_ids)[self.dropped :]]
        if not prompt:
            raise NotThereError("a prompt has no other token")
        return replace(request, prompt_token_ids=prompt)


@contextmanager
def applied(engine: TrainerEngine, change: ForwardChange, donor: str | None) -> Iterator[None]:
    """The engine's model with a change, for the while.

    Raises:
        NotThereError: The model has nothing that could be changed so.
    """
    from mismatch_probe.engines.attribute.changes import kv_through_fp8
    from mismatch_probe.engines.diagnose.weights import donated, quantised

    model: Any = engine.run_on_model(lambda model: model)
    with ExitStack() as stack:
        if change.random:
            stack.enter_context(_random(model))
        if change.positions:
            stack.enter_context(_positions(model, change.positions))
        if change.rope:
            stack.enter_context(_rope(model, change.rope))
        if change.weights:
            stack.enter_context(quantised(model, change.weights))
        if change.kv_fp8:
            stack.enter_context(kv_through_fp8(model))
        if change.window:
            stack.enter_context(_window(model, change.window))
        if change.donated is not None:
            assert donor is not None
            stack.enter_context(donated(model, donor, change.donated))
        yield


@contextmanager
def _random(model: Any) -> Iterator[None]:
    """Train mode; a model whose dropout is 0 everywhere has nothing random."""
    import torch
    from torch import nn

    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    rates += [getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0]
    if not any(rates):
        raise NotThereError("the model's configuration has no dropout")
    model.train()
    torch.manual_seed(0)
    try:
        yield
    finally:
        model.eval()


@contextmanager
def _positions(model: Any, dtype: str) -> Iterator[None]:
    """Position ids rounded to a dtype, in all modules that take them."""
    import torch

    def rounded(positions: Tensor) -> Tensor:
        return positions.to(getattr(torch, dtype)).to(positions.dtype)

    rotary = _rotary(model)

    def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": rounded(kwargs["position_ids"])}
        return (args[0], rounded(args[1]), *args[2:]), kwargs

    handle = rotary.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _rotary(model: Any) -> Any:
    found = [m for m in model.modules() if hasattr(m, "inv_freq") and "rotary" in type(m).__name__.lower()]
    if len(found) != 1:
        raise NotThereError("the model has no single module of rotary frequencies")
    return found[0]


@contextmanager
def _rope(model: Any, change: str) -> Iterator[None]:
    """Other rotary frequencies: of a lost buffer all 1, linear or NTK scaling by a factor, another base."""
    import torch

    rotary = _rotary(model)
    before = rotary.inv_freq
    kind, _, text = change.partition(":")
    steps = torch.arange(len(before), dtype=torch.float64) / len(before)  # `[H]` exponents of the base
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    base = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)
    if kind == "lost":
        new = torch.ones(len(before))
    elif kind == "linear":
        new = before.double().cpu() / float(text)
    elif kind == "ntk":  # dynamic NTK: the base grows by F^(d/(d − 2))
        new = (base * float(text) ** (len(before) / max(len(before) - 1, 1))) ** -steps
    else:
        new = float(text) ** -steps
    if torch.allclose(new.double(), before.double().cpu(), rtol=1e-4):
        raise NotThereError("these are the model's own frequencies")
    rotary.inv_freq = new.to(before)
    try:
        yield
    finally:
        rotary.inv_freq = before


@contextmanager
def _window(model: Any, width: int) -> Iterator[None]:
    """Attention that sees the last `width` tokens."""
    import torch

    from mismatch_probe.engines.attribute.changes import attention_changed

    if model.config._attn_implementation != "sdpa":
        raise NotThereError("attention is not SDPA")

    def narrow(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            n = query.shape[2]
            at = torch.arange(n, device=query.device)
            allowed = (at[:, None] >= at) & (at[:, None] - at < width)
            if mask is None:
                mask = allowed[None, None]
            elif mask.dtype == torch.bool:
                mask = mask & allowed
            else:
                mask = mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
            return function(module, query, key, value, mask, *args, **kwargs)

        return call

    with attention_changed(model, narrow):
        yield
