"""Peaks of every activation of a forward pass, taken by hooks: of modules, and of what no module makes.

What stays between modules (scores of attention, softmax inputs, products of fused experts) is seen as the arguments of
torch's own functions. Nothing is copied or waited for until a sequence has ended: a peak is one number a token.

Shape legend: `T` tokens of the one sequence that runs, `M` tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.engines.audit.places import Network, Place, is_attention, runs_experts

_SCORES_AT_ONCE = 1 << 24
# What masks attention: neither a score nor an overflow.
_MASKED = -1e30


class ForwardTracker:
    """Watches one sequence after another run through a model.

    Args:
        model: A causal language model of transformers. With fused attention its scores are computed once more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._network = model, Network.of(model)
        # Whether attention ran as one kernel, which keeps products and scores in FP32 whatever the dtype.
        self.fused = False
        self._places: dict[str, Place] = {}
        self._peaks: dict[str, Tensor] = {}
        self._tokens = 0
        self._running: list[str] = []
        # The module output that was seen last, with its peaks, and the peaks that were taken last of anything.
        self._last: Tensor | None = None
        self._last_peaks: Tensor | None = None
        self._latest: Tensor | None = None
        self._looking = False

    @property
    def places(self) -> tuple[Place, ...]:
        """`M` tensors in the order in which they were first made."""
        return tuple(self._places.values())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the decoder layers."""
        return self._network.layers

    @contextmanager
    def watching(self) -> Iterator[ForwardTracker]:
        """Hooks in place for the while; `sequence` runs inside."""
        handles = []
        for name, module in self._model.named_modules():
            if not name:
                continue
            handles.append(module.register_forward_pre_hook(self._before(name, module), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(name)))
        try:
            with _watched(self.function):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def sequence(self, tokens: int, run: Callable[[], None]) -> dict[str, NDArray[np.float32]]:
        """Runs a forward pass of one sequence, and returns `[T]` peaks by tensor; of one that is not placed, the same
        number T times.

        Args:
            tokens: Of the sequence.
            run: The pass.
        """
        self._peaks, self._tokens, self._running, self._last, self._looking = {}, tokens, [], None, False
        run()
        self._last = None
        # One transfer for all of them.
        parts = [peaks if peaks.ndim else peaks.expand(tokens) for peaks in self._peaks.values()]
        values = torch.cat(parts).view(len(parts), tokens).float().cpu().numpy()
        return dict(zip(self._peaks, values, strict=True))

    def observe(self, place: Place, tensor: Tensor) -> None:
        """Takes the peaks of a tensor: by token where it has them, else one for all."""
        if tensor.ndim == 3 and tensor.shape[1] == self._tokens:  # nearly all of them
            self._keep(place, tensor.detach().abs().amax((0, 2)))
        elif tensor.ndim == 3 and place.kind == "logits" and tensor.shape[1] < self._tokens:
            # Of the last tokens only: a head that is asked for no more.
            rows = tensor.detach().abs().amax((0, 2))
            self._keep(place, nn.functional.pad(rows, (self._tokens - len(rows), 0)))
        elif tensor.numel() and tensor.is_floating_point():
            kept = next((d for d in range(min(2, tensor.ndim)) if tensor.shape[d] == self._tokens), None)
            others = [d for d in range(tensor.ndim) if d != kept]
            self._keep(place, tensor.detach().abs().amax(others) if others else tensor.detach().abs())

    def observe_scores(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Takes the peaks of attention's products q·k, before and after their scaling.

        Masked products count: eager attention makes them all, and masks them afterwards.

        Args:
            query: `[1, H, T, D]`.
            key: `[1, K, T, D]`, H a multiple of K.
            scale: What products are multiplied by; None for 1/√D.
        """
        tokens, size = query.shape[-2:]
        if query.ndim != 4 or query.shape[0] != 1 or tokens != self._tokens:
            return
        grouped = query.detach()[0].reshape(key.shape[1], -1, tokens, size)  # [K, H/K, T, D]
        keys = key.detach()[0].transpose(1, 2)[:, None]  # [K, 1, D, T]
        peaks = _product_peaks(grouped, keys)
        name = self._running[-1]
        self._keep(Place.of(f"{name} (q·k)", "attention product"), peaks)
        self._keep(Place.of(f"{name} (scores)", "softmax input"), peaks * (scale or 1 / math.sqrt(size)))

    def function(self, role: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at the arguments of a torch function that is about to be called."""
        if not self._running or self._looking:
            return
        self._looking = True  # what is computed here is none of the model's
        name = self._running[-1]
        if role == "product":
            tensors = [argument for argument in args[:2] if isinstance(argument, Tensor)]
            if runs_experts(name):
                for tensor in tensors:  # activations and weights come in either order
                    self.observe(Place.of(f"{name} (product)", "mlp product"), tensor)
            elif len(tensors) == 2 and is_attention(name):
                self._observe_product(name, *tensors)
        elif role == "attention":
            self.fused = True
            query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            self.observe_scores(query, key, kwargs.get("scale"))
        else:
            logits = (args[0] if args else kwargs["input"]).detach()
            kind = "softmax input" if is_attention(name) else "router logits"
            self._observe_rows(Place.of(f"{name} (scores)", kind), logits.masked_fill(logits < _MASKED, 0.0))
        self._looking = False

    def _observe_product(self, name: str, first: Tensor, second: Tensor) -> None:
        """Takes the peaks of q·k where attention multiplies them by itself: `[1, H, T, D]` by `[1, H, D, T]`."""
        if min(first.ndim, second.ndim) < 3 or not first.shape[-2] == second.shape[-1] == self._tokens:
            return
        self._keep(Place.of(f"{name} (q·k)", "attention product"), _product_peaks(first.detach(), second.detach()))

    def _observe_rows(self, place: Place, rows: Tensor) -> None:
        """Takes the peaks of rows of scores `[1, H, T, …]`, whose tokens are the last but one dimension."""
        if rows.ndim >= 3 and rows.shape[-2] == self._tokens:
            rows = rows.movedim(-2, 0)
        self.observe(place, rows)

    def _keep(self, place: Place, peaks: Tensor) -> None:
        self._latest = peaks
        if place.name not in self._places:
            self._places[place.name] = replace(place, placed=bool(peaks.ndim))
        known = self._peaks.get(place.name)
        self._peaks[place.name] = peaks if known is None else torch.maximum(known, peaks)

    def _before(self, name: str, module: nn.Module) -> Callable[..., None]:
        place = self._network.input(name, module)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            given = args[0] if args else kwargs.get("hidden_states")
            if place is None or not isinstance(given, Tensor):
                return
            if given is not self._last:
                self.observe(place, given)
            elif place.kind != "residual" and self._last_peaks is not None:  # the stream is no module's own output
                self._keep(place, self._last_peaks)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        place = self._network.output(name)

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._running.pop()
            tensor = first_tensor(output)
            # A module that hands on what its last child made has nothing of its own, a decoder layer excepted, whose
            # output is the stream.
            if tensor is None or (tensor is self._last and place.kind != "residual"):
                return
            self.observe(place, tensor)
            self._last, self._last_peaks = tensor, self._latest

        return hook


# By what they are looked at as; a function that is reached by another name than these is not seen.
_WATCHED: tuple[tuple[Any, str, str], ...] = (
    (nn.functional, "scaled_dot_product_attention", "attention"),
    (nn.functional, "softmax", "softmax"),
    (torch, "softmax", "softmax"),
    (Tensor, "softmax", "softmax"),
    (nn.functional, "linear", "product"),
    (torch, "bmm", "product"),
    (torch, "matmul", "product"),
    (torch, "_grouped_mm", "product"),
)


@contextmanager
def _watched(look: Callable[..., None]) -> Iterator[None]:
    """Shows the arguments of some torch functions to `look` before they run, for the while.

    A mode of torch's own would see every function however it is reached, at a cost of a third of a forward pass.
    """

    def shown(function: Any, role: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            look(role, args, kwargs)
            return function(*args, **kwargs)

        return call

    found = [(owner, name, getattr(owner, name), role) for owner, name, role in _WATCHED if hasattr(owner, name)]
    try:
        for owner, name, function, role in found:
            setattr(owner, name, shown(function, role))
        yield
    finally:
        for owner, name, function, _ in found:
            setattr(owner, name, function)


def _product_peaks(rows: Tensor, columns: Tensor) -> Tensor:
    """`[T]` largest magnitude of each row of a product, which is made some rows at a time.

    Args:
        rows: `[…, T, D]`.
        columns: `[…, D, T]`.
    """
    step = max(1, _SCORES_AT_ONCE // (rows[..., 0, 0].numel() * columns.shape[-1]))
    others = (*range(rows.ndim - 2), rows.ndim - 1)
    return torch.cat([(part @ columns).abs_().amax(others) for part in torch.split(rows, step, dim=-2)])


def first_tensor(output: Any) -> Tensor | None:
    """The floating-point tensor that a module's output is, or begins with."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    if isinstance(output, dict):
        return next((found for item in output.values() if (found := first_tensor(item)) is not None), None)
    return None
