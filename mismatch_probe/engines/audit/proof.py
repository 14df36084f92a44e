"""A real forward and backward pass in FP16, with the loss scale backing off as a dynamic scaler's does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mismatch_probe.engines.audit.backward import output_gradients
from mismatch_probe.engines.audit.forward import first_tensor
from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.metrics.floats import FIRST_SCALE

# GradScaler goes on for ever; a scale this small flushes everything.
_LOWEST = -24


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
