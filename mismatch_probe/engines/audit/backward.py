"""Gradients of a policy-gradient-like step, by tensor: histograms over binary exponents, and where one first breaks;
and a real step in FP16, with the loss scale backing off as a dynamic scaler's does.

The loss is −Σ A_i log π(y_t) / N over the response tokens of a batch, one sequence at a time, as gradient accumulation
has it; N is the number of tokens that a real step would average over, which shifts every gradient by a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mismatch_probe.engines.audit.forward import first_tensor
from mismatch_probe.engines.audit.places import Network
from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.metrics.floats import EXPONENTS, FIRST_SCALE, ExponentHistogram

_CHUNK = 1 << 24
# GradScaler goes on for ever; a scale this small flushes everything.
_LOWEST = -24


class Exponents:
    """Adds up the histogram of a tensor that comes in parts, on its device."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(EXPONENTS, dtype=torch.int64, device=device)
        self._mass = torch.zeros(EXPONENTS, dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float32, device=device)

    def add(self, values: Tensor) -> Tensor:
        """Adds the elements, and returns their largest finite magnitude, a scalar on the device."""
        largest = torch.zeros_like(self._largest)
        for part in torch.split(values.detach().float().flatten(), _CHUNK):
            exponent = ((part.contiguous().view(torch.int32) >> 23) & 0xFF).to(torch.int64)
            magnitude = part.abs()
            self._counts += torch.bincount(exponent, minlength=EXPONENTS)
            finite = torch.where(exponent == EXPONENTS - 1, 0.0, magnitude)
            self._mass += torch.bincount(exponent, weights=finite.double(), minlength=EXPONENTS)
            largest = torch.maximum(largest, finite.max() if finite.numel() else largest)
        self._largest = torch.maximum(self._largest, largest)
        return largest

    def histogram(self) -> ExponentHistogram:
        return ExponentHistogram(self._counts.cpu().numpy(), self._mass.cpu().numpy(), float(self._largest))


class GradientTracker:
    """Histograms of activation and weight gradients.

    Args:
        model: Whose weights take gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._found: dict[str, Exponents] = {}
        self._largest: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[GradientTracker]:
        """Hooks on every module's output for the while."""

        def on_gradient(name: str) -> Callable[[Tensor], None]:
            return lambda gradient: self._add(f"{name} (activation)", gradient)

        with output_gradients(self._model, on_gradient):
            yield self

    def weights(self) -> None:
        """Adds the gradients that a sequence left at the weights."""
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                self._add(name, parameter.grad)

    def largest(self) -> float:
        """The largest gradient of any tensor since the last call."""
        found, self._largest = self._largest, []
        return float(torch.stack(found).max()) if found else 0.0

    def histograms(self) -> dict[str, ExponentHistogram]:
        """By tensor, in the order in which they were met: activations from the loss backwards."""
        return {name: found.histogram() for name, found in self._found.items()}

    def _add(self, name: str, gradient: Tensor) -> None:
        if name not in self._found:
            self._found[name] = Exponents(self._device)
        self._largest.append(self._found[name].add(gradient))


@contextmanager
def output_gradients(model: nn.Module, make: Callable[[str], Callable[[Tensor], None]]) -> Iterator[None]:
    """Calls a function with the gradient of each module's output, and of inputs that no module makes, for the while. A
    tensor that several modules hand on belongs to the innermost of them.

    Args:
        model: The model.
        make: From a tensor's name to what is called with gradients, in the order of the backward pass.
    """
    last: list[Tensor | None] = [None]
    handles, network = [], Network.of(model)

    def hook_of(name: str) -> Callable[..., None]:
        on_gradient = make(name)

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor is not last[0] and tensor.requires_grad:
                last[0] = tensor
                tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    def before_of(name: str) -> Callable[..., None]:
        on_gradient = make(name)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0] is not last[0] and args[0].requires_grad:
                args[0].register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    for name, module in model.named_modules():
        if not name:
            continue
        given = network.input(name, module)
        if given is not None:
            handles.append(module.register_forward_pre_hook(before_of(given.name)))
        handles.append(module.register_forward_hook(hook_of(name)))
    try:
        yield
    finally:
        last[0] = None
        for handle in handles:
            handle.remove()


class Fp16Proof:
    """Runs sequences one after another at a loss scale that only falls.

    Args:
        engine: In FP16, as it is trained.
        model: Its network.
        temperature: What logits are divided by.
        step_tokens: Tokens that a step's loss is averaged over.
        highest: Exponent of the largest scale that FP32 gradients leave room for: between the first try and it no other
            scale is tried.
    """

    def __init__(
        self, engine: TrainerEngine, model: nn.Module, temperature: float, step_tokens: int, highest: int | None
    ) -> None:
        self._engine, self._model = engine, model.requires_grad_(True)
        self._temperature, self._tokens, self._highest = temperature, step_tokens, highest
        self.exponent = FIRST_SCALE
        self.attempts: list[dict[str, Any]] = []
        self.n_sequences = 0

    def run(self, batch: Batch, sign: float) -> bool:
        """Takes one sequence through, at the first scale that leaves every gradient finite.

        Args:
            batch: Of one sequence.
            sign: Its advantage.

        Returns:
            Whether there is such a scale.
        """
        self.n_sequences += 1
        while True:
            forward, backward = self._attempt(batch, sign)
            if forward or backward or not self.attempts:
                self.attempts.append({"exponent": self.exponent, "forward": forward, "backward": backward})
            if forward is None and backward is None:
                return True
            if forward is not None or self.exponent <= _LOWEST:
                return False
            room = self.exponent if self._highest is None else max(self._highest, _LOWEST)
            self.exponent = min(self.exponent - 1, room)

    def facts(self) -> dict[str, Any]:
        """`forward` and `backward` name the first tensor that was not finite, None where none was."""
        last = self.attempts[-1]
        finite = last["forward"] is None and (last["backward"] is None or self.exponent < last["exponent"])
        return {
            "n_sequences": self.n_sequences,
            "initial_exponent": FIRST_SCALE,
            "exponent": self.exponent if finite else None,
            "finite": finite,
            "first_nonfinite_forward": next((a["forward"] for a in self.attempts if a["forward"]), None),
            "first_nonfinite_backward": next((a["backward"] for a in self.attempts if a["backward"]), None),
            "attempts": self.attempts,
        }

    def _attempt(self, batch: Batch, sign: float) -> tuple[str | None, str | None]:
        """The first tensor that is not finite in the forward pass, and in the backward pass."""
        forward, backward = _Finite(), _Finite()
        with forward.outputs(self._model), output_gradients(self._model, backward.look):
            with self._engine.precision():
                logprobs, _ = token_logprobs(self._model, batch, self._temperature)
            loss = -sign * logprobs[batch.mask].sum() / self._tokens
            forward.look("log-probs")(loss)
            (loss * 2.0**self.exponent).backward()  # type: ignore[no-untyped-call]
        broken = forward.first()
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                backward.look(name)(parameter.grad)
                parameter.grad = None
        return broken, None if broken else backward.first()


class _Finite:
    """Remembers, in order, which tensors are finite; asks the device once."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._flags: list[Tensor] = []

    def look(self, name: str) -> Callable[[Tensor], None]:
        def look(tensor: Tensor) -> None:
            self._names.append(name)
            self._flags.append(torch.isfinite(tensor.detach()).all())

        return look

    @contextmanager
    def outputs(self, model: nn.Module) -> Any:
        """Looks at every module's output for the while."""

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                tensor = first_tensor(output)
                if tensor is not None:
                    self.look(name)(tensor)

            return hook

        handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def first(self) -> str | None:
        finite = torch.stack(self._flags).tolist() if self._flags else []
        return next((name for name, flag in zip(self._names, finite, strict=True) if not flag), None)


def prove(
    proof: Fp16Proof, batches: Sequence[Batch], signs: Sequence[float], on_tokens: Callable[[int], None]
) -> dict[str, Any]:
    """Takes sequences through until one cannot be."""
    for batch, sign in zip(batches, signs, strict=True):
        going_on = proof.run(batch, sign)
        on_tokens(batch.ids.shape[1])
        if not going_on:
            break
    return proof.facts()
