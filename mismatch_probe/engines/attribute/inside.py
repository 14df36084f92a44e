"""The trainer's inside against a trace of the engine's: over the whole pass, by layer, and module by module.

Three forward passes over the traced sequences, each in the trainer's dtype and in a wider one:

- `stream`: nothing is touched; what differs at a layer has come up from all layers before it.
- `layer`: every layer is given what the engine's layer was given; what differs is that layer's own.
- `module`: every leaf is given the engine's input and hands on the engine's output, so that what differs is the
  module's own, and what reaches a module's input, or the end of a layer, that of the code between modules.

The wider pass sees the same inputs and says what the engine's and the trainer's results would be without rounding.

Shape legend: `S` sequences, `T` tokens of the longest, `R` tokens of all, `W` width of a module, `V` vocabulary, `Q`
rows whose logits were kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.engines.attribute.changes import attention_of, in_fp32, tensors_kept
from mismatch_probe.engines.attribute.inside_rows import Batch, EngineRecords
from mismatch_probe.engines.attribute.trace import TraceFiles
from mismatch_probe.engines.audit.forward import first_tensor
from mismatch_probe.engines.audit.places import Network, is_norm, is_router, layer_index
from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.engines.float64 import keep_float64
from mismatch_probe.metrics.exact import divergences

# Projections to queries, keys and values in one, whose rows every implementation lays out in its own way.
_FUSED = re.compile(r"qkv|query_key_value|c_attn", re.IGNORECASE)
# From this relative distance on a column is another one; from this share of such columns on the two can have other
# layouts; an order is theirs if it leaves so little of the distance, and so many columns are their own.
_FAR, _FEW, _NEAR, _OWN = 0.5, 0.01, 0.25, 0.9
_COLUMNS = 1024
_LEAST_ROW = 0.1
Kind = Literal["stream", "layer", "module", "between", "end"]


@dataclass
class Difference:
    """Squared relative errors of a tensor, summed over the tokens of each sequence.

    Every token counts alike: the first one's activations can be hundreds of times larger than any other's.

    Attributes:
        kind: Of `Kind`. In the pass of `module`, `between` is what reaches a module's input, and `end` what a layer
            hands on: the engine's results of its modules, put together by the trainer's own code.
        name: The trainer's module.
        layer: Index of its layer, None outside of them.
        apart: `[S]` engine against trainer.
        engine: `[S]` engine against the wider pass.
        trainer: `[S]` trainer against the wider pass.
        size: `[S]` tokens.
    """

    kind: Kind
    name: str
    layer: int | None
    apart: NDArray[np.float64]
    engine: NDArray[np.float64]
    trainer: NDArray[np.float64]
    size: NDArray[np.float64]


class InsideComparison:
    """Compares a trainer's model with a trace.

    Args:
        engine: The trainer.
        model: Its network.
        folder: The trace's.
    """

    def __init__(self, engine: TrainerEngine, model: Any, folder: str | Path) -> None:
        files = TraceFiles(folder)
        self._engine, self._model = engine, model
        self._network = Network.of(model)
        self._choices: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self._orders: dict[str, Tensor | None] = {}
        self._flips: dict[str, Tensor | None] = {}
        self._request = files.facts()["request"]
        self._leaves = {
            name: module
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
            and name not in (self._network.head, self._network.embedding)
        }
        widths = {name: _width(module) for name, module in self._leaves.items()}
        self._trace = EngineRecords(files, self._network, widths)
        self._batch = Batch(self._request["sequences"], next(model.parameters()).device)
        self._blocks = {
            f"{layer}.{name}"
            for layer in self._network.layers
            for name, _ in model.get_submodule(layer).named_children()
        }

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the decoder layers."""
        return self._network.layers

    def differences(self, kinds: Sequence[str] = ("stream", "layer", "module")) -> list[Difference]:
        """What the engine and the trainer are apart, of the passes that are asked for."""
        narrow = {kind: self._pass(kind) for kind in kinds}
        logits, dtype = self._logits(), next(self._model.parameters()).dtype
        autocast = self._engine.identity()["mode"] == "autocast"
        wide = torch.float64 if dtype == torch.float32 and not autocast else torch.float32
        with ExitStack() as stack:
            stack.enter_context(tensors_kept(self._model))
            if self._model.config._attn_implementation.startswith("flash"):  # which takes no FP32
                stack.enter_context(attention_of(self._model, "sdpa"))
            self._model.to(wide)
            if wide == torch.float64:
                stack.enter_context(keep_float64(self._model))
            return [*self._joined(narrow), *self._logit_differences(logits)]

    def _joined(self, narrow: Mapping[Any, Mapping[tuple[Kind, str], Tensor]]) -> Iterator[Difference]:
        for kind, records in narrow.items():
            for (found, name), wide in self._pass(kind, plain=True).items():
                ours = records.get((found, name))
                if name == self._network.embedding and found == "module":
                    theirs = self._trace.find(self._network.layers[0], "in")
                else:
                    theirs = self._trace.find(name, "in") if found == "between" else self._made(name)
                if ours is not None and theirs is not None and theirs.numel() == ours.numel() == wide.numel():
                    yield self._difference(found, name, theirs.reshape(ours.shape), ours, wide)

    def _difference(self, kind: Kind, name: str, theirs: Tensor, ours: Tensor, wide: Tensor) -> Difference:
        layer = layer_index(self._network.layers, name)
        t, o, w = (tensor.double().reshape(len(tensor), -1) for tensor in (theirs, ours, wide))
        # Tokens that the trainer's router sent elsewhere say nothing of the experts.
        flips = self._flips.get(name) if kind == "module" else None
        kept = 1.0 if flips is None or bool(flips.all()) else (~flips).double()
        parts = [self._batch.by_sequence(row * kept) for row in _relative_squares(t, o, w)]
        return Difference(kind, name, layer, *parts)

    @torch.inference_mode()
    def _pass(self, kind: str, *, plain: bool = False) -> dict[tuple[Kind, str], Tensor]:
        """Records `[R, W]` of one forward pass, see the module's text; `plain` without autocast."""
        found: dict[tuple[Kind, str], Tensor] = {}
        handles = []
        for name, module in self._model.named_modules():
            if is_router(name):
                handles.append(module.register_forward_hook(self._same_experts(kind, name, again=plain)))
            if name in self._network.layers:
                handles += self._watch_layer(kind, name, module, found)
            elif kind == "module" and name in self._leaves:
                handles.append(module.register_forward_pre_hook(self._given(name, found), with_kwargs=True))
                handles.append(module.register_forward_hook(self._handing_on(name, found)))
            elif kind == "module" and hasattr(module, "experts"):
                handles.append(module.register_forward_hook(self._handing_on(name, found, f"{name}.experts")))
            elif kind == "stream" and (name in self._blocks or name == self._network.embedding):
                handles.append(module.register_forward_hook(self._recorder("stream", name, found)))
        try:
            with nullcontext() if plain else self._engine.precision():
                self._model.get_decoder()(**self._batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _same_experts(self, kind: str, name: str, *, again: bool) -> Callable[..., Any]:
        """A hook on a router: the wider pass takes the other's experts, or it would be that of another model."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return None
            if not again:
                self._choices[kind, name] = output
                if kind == "module":
                    self._note_flips(name, output)
                return None
            kept = self._choices[kind, name]
            return tuple(
                own if i == 0 else before.to(own.dtype)  # logits are the pass's own
                for i, (own, before) in enumerate(zip(output, kept, strict=True))
            )

        return hook

    def _note_flips(self, name: str, output: tuple[Any, ...]) -> None:
        """Keeps which tokens the engine's logits of a router send to other experts than the trainer chose."""
        theirs = self._trace.find(name, "out")
        rows = [self._batch.rows(tensor) for tensor in output if isinstance(tensor, Tensor)]
        logits = next((r for r in rows if theirs is not None and r is not None and r.shape == theirs.shape), None)
        chosen = next((r for r in rows if r is not None and not r.is_floating_point()), None)
        flips = None
        if theirs is not None and logits is not None and chosen is not None:
            flips = flipped(theirs, logits, chosen)
        block = name.rpartition(".")[0]
        self._flips[block] = self._flips[f"{block}.experts"] = flips

    def _recorder(self, kind: Kind, name: str, found: dict[tuple[Kind, str], Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = first_tensor(output)
            rows = None if tensor is None else self._batch.rows(tensor)
            if rows is not None:
                found[kind, name] = rows

        return hook

    def _watch_layer(self, kind: str, name: str, module: nn.Module, found: dict[tuple[Kind, str], Tensor]) -> list[Any]:
        handles = []
        if kind == "module" and name == self._network.layers[0]:
            # What enters the first layer is the embedding's, with whatever either side multiplies it by.
            handles.append(module.register_forward_pre_hook(self._embedded(found), with_kwargs=True))
        if kind != "stream":
            handles.append(module.register_forward_pre_hook(self._given(name, None), with_kwargs=True))
        shown: Kind = {"stream": "stream", "layer": "layer"}.get(kind, "end")  # type: ignore[assignment]
        handles.append(module.register_forward_hook(self._recorder(shown, name, found)))
        return handles

    def _embedded(self, found: dict[tuple[Kind, str], Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = args[0] if args else kwargs.get("hidden_states")
            rows = self._batch.rows(own) if isinstance(own, Tensor) else None
            if rows is not None:
                found["module", self._network.embedding] = rows

        return hook

    def _handing_on(self, name: str, found: dict[tuple[Kind, str], Tensor], unless: str = "") -> Callable[..., Any]:
        """A hook that notes in `found` what a module made, and hands on what the engine's made; not where the engine
        has the result of the module `unless`, which stands for it.
        """
        record = self._recorder("module", name, found)

        def hook(owner: nn.Module, args: Any, output: Any) -> Any:
            if unless and self._trace.find(unless, "out") is not None:
                return None
            record(owner, args, output)
            ours = found.get(("module", name))
            theirs = None if ours is None else self._made(name, ours)
            if not isinstance(output, Tensor) or ours is None or theirs is None or theirs.numel() != ours.numel():
                return None
            return self._batch.padded(theirs, output)

        return hook

    def _made(self, name: str, ours: Tensor | None = None) -> Tensor | None:
        """What the engine's module made, its columns in the trainer's order, which `ours` `[R, W]` shows at first."""
        theirs = self._trace.find(name, "out")
        if theirs is None or not _FUSED.search(name):
            return theirs
        if name not in self._orders and ours is not None and ours.shape == theirs.shape:
            self._orders[name] = column_order(theirs, ours)
        order = self._orders.get(name)
        return theirs if order is None else theirs[:, order]

    def _given(self, name: str, found: dict[tuple[Kind, str], Tensor] | None) -> Callable[..., Any]:
        """A hook that gives a module the engine's input, and notes in `found` what it would have had.

        A norm of a layer reads the residual stream, which goes on beside it: there it becomes the engine's as well, or
        what the layer did to it before would be found again at its end.
        """
        of_stream = name.rpartition(".")[0] in self._network.layers and is_norm(self._model.get_submodule(name))

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            theirs = self._trace.find(name, "in")
            own = args[0] if args else kwargs.get("hidden_states")
            rows = self._batch.rows(own) if isinstance(own, Tensor) and own.is_floating_point() else None
            if theirs is None or rows is None or theirs.numel() != rows.numel():
                return None
            if found is not None:
                found["between", name] = rows
            assert isinstance(own, Tensor)
            given = self._batch.padded(theirs, own)
            if found is not None and of_stream:
                own.copy_(given)
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        return hook

    def _logits(self) -> Tensor:
        """`[Q, V]` logits that the trainer's own forward makes of the engine's last hidden states."""
        rows = self._trace.outside("final.out")[self._request["logit_rows"]]
        weight = next(self._model.parameters())
        return self._engine.head_logits(rows.to(weight.device, weight.dtype)).to("cpu")

    def _logit_differences(self, ours: Tensor) -> Iterator[Difference]:
        wide = self._logits()
        theirs = self._trace.outside("logits")[:, : ours.shape[1]]
        # A shift of all logits changes no probability.
        t, o, w = (x.double() - x.double().mean(1, keepdim=True) for x in (theirs, ours, wide))
        # Of all sequences together: a part each, so that their sum is right.
        count = self._batch.shape[0]
        sums = [np.full(count, float(row.sum()) / count) for row in _relative_squares(t, o, w)]
        yield Difference("module", self._network.head or "lm_head", None, *sums)

    def _projected(self, width: int) -> bool:
        """Whether the decoder changes its states' width behind the last norm (OPT)."""
        stream = self._trace.find(self._network.layers[-1], "out")
        return stream is None or stream.shape[1] != width

    @torch.inference_mode()
    def lens(self) -> dict[str, NDArray[np.float64]]:
        """By layer `[Q]` KL(engine‖trainer) of what the trainer's last norm and head make of both streams, nats.

        The head is in FP32 for both, so that the streams alone differ. Empty where the last norm was not found.
        """
        decoder = self._model.get_decoder()
        norms = [module for name, module in decoder.named_children() if is_norm(module)]
        width = self._trace.outside("final.out").shape[1]
        if len(norms) != 1 or self._projected(width):
            return {}
        weight = next(self._model.parameters())
        chosen, found = self._request["logit_rows"], {}
        ours = self._pass("stream")
        with in_fp32(self._model, ["head"], weight.dtype):
            for name in self._network.layers:
                theirs = self._trace.find(name, "out")
                if theirs is None or ("stream", name) not in ours:
                    continue
                states = [t[chosen].to(weight.device, weight.dtype) for t in (theirs, ours["stream", name])]
                logits = [self._engine.head_logits(norms[0](s)).float().cpu().numpy() for s in states]
                found[name] = divergences(logits[0], logits[1], 1.0)["kl"]
        return found


def flipped(theirs: Tensor, ours: Tensor, chosen: Tensor) -> Tensor | None:
    """`[R]` whether a token's experts are others by the engine's logits; None where a router does not take the largest.

    Args:
        theirs: `[R, E]` the engine's logits.
        ours: `[R, E]` the trainer's.
        chosen: `[R, K]` experts that the trainer chose.
    """
    count = chosen.shape[1]
    largest, other = (logits.topk(count, dim=1).indices.sort(dim=1).values for logits in (ours, theirs))
    own = chosen.sort(dim=1).values.to(largest.dtype)
    return (other != own).any(dim=1) if largest.equal(own) else None


def column_order(theirs: Tensor, ours: Tensor) -> Tensor | None:
    """`[W]` where each of the trainer's columns is among the engine's, None where no other order brings them together.

    Args:
        theirs: `[R, W]` what the engine's module made.
        ours: `[R, W]` what the trainer's made of the same input.
    """
    t, o = theirs.double(), ours.double()
    far = (t - o).norm(dim=0) > _FAR * o.norm(dim=0)
    if not far.double().mean() > _FEW:
        return None
    squares = t.square().sum(0)
    best = torch.cat([(squares - 2 * columns.T @ t).argmin(1) for columns in torch.split(o, _COLUMNS, dim=1)])
    # Columns can be twins: keys of heads that were copied, or dead ones.
    own = len(torch.unique(best)) >= _OWN * len(best)
    return best if own and (t[:, best] - o).norm() < _NEAR * (t - o).norm() else None


def _relative_squares(theirs: Tensor, ours: Tensor, wide: Tensor) -> list[Tensor]:
    """Of rows `[R, W]`: engine against trainer, both against the wider pass, over its squares, and 1: four `[R]`.

    A row that is next to nothing is divided by a part of the middle one's squares: where a module has few columns, as
    the gate of a shared expert has one, a single token near 0 would decide.
    """
    size = wide.square().sum(1)
    size = size.clamp(min=float(_LEAST_ROW * size.median())).clamp(min=torch.finfo(wide.dtype).tiny)
    differences = (theirs - ours, theirs - wide, ours - wide)
    return [*(d.square().sum(1) / size for d in differences), torch.ones_like(size)]


def _width(module: nn.Module) -> int:
    """Output width of a projection: `out_features`, or what its weight says (GPT-2's Conv1D keeps `nf`)."""
    for name in ("out_features", "nf"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return 0
