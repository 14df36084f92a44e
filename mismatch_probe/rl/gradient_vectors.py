"""Gradients of weighted sums of a sequence's log-probs, projected, and the weights that the corrections give.

A gradient has as many components as the model has weights, so only a projection of it is kept, by the count sketch of
Charikar, Chen and Farach-Colton (2002): each weight of the model is given one of K components and a random sign once
and for all, and a component is the signed sum of its weights' gradients. As a matrix it has one ±1 in each column, so
it costs one pass over the gradient instead of K. Inner products are kept in expectation, with a variance of at most
(|x|²|y|² + ⟨x, y⟩²)/K, as with K dense directions of random signs. Vectors that nearly agree share their error: that of
a cosine c is about (1 − c²)/√K.

Shape legend: `T` response tokens, `K` components, `W` weightings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.rl.gradient_task import DIRECTIONS, SequenceTask, Vectors
from mismatch_probe.rl.losses import ALGORITHMS, LossSpec, correction_weights

# Each with the constants of the paper, or of its authors. Before the first update π′ is π, so that clips of π/π′ touch
# nothing, and a correction alone tells algorithms apart.
CORRECTIONS: dict[str, LossSpec] = {
    ALGORITHMS[name].correction: ALGORITHMS[name]
    for name in ("pg-token-tis", "icepop", "pg-seq-is", "pg-seq-tis", "pg-seq-mis")
}
_SEED = 0
# Elements that are at hand in float64 at once.
_CHUNK = 1 << 24
Floats = NDArray[np.float64]


class Sketch:
    """The projection, the same for every gradient of a model; 2 bytes for each of its weights.

    Args:
        parameters: Of the model, in their order.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._draws: list[Tensor] = []
        generator: torch.Generator | None = None
        for parameter in parameters:
            if generator is None:
                generator = torch.Generator(parameter.device).manual_seed(_SEED)
            size, device = (parameter.numel(),), parameter.device
            # The lowest bit is the sign, the others are the component.
            draws = torch.randint(2 * DIRECTIONS, size, generator=generator, dtype=torch.int16, device=device)
            self._draws.append(draws)

    def project(self, gradients: Sequence[Tensor | None]) -> Floats:
        """`[K]` projection of a gradient that comes as one tensor a parameter, None where it is 0."""
        sums = torch.zeros(2 * DIRECTIONS, dtype=torch.float64, device=self._draws[0].device)
        for draws, gradient in zip(self._draws, gradients, strict=True):
            if gradient is None:
                continue
            parts = zip(torch.split(draws, _CHUNK), torch.split(gradient.flatten(), _CHUNK), strict=True)
            for index, values in parts:
                sums += torch.bincount(index.long(), weights=values.double(), minlength=2 * DIRECTIONS)
        return np.asarray((sums[::2] - sums[1::2]).cpu().numpy())


class WeightedGradients:
    """Makes the projected gradients of a policy.

    Args:
        model: A causal language model of transformers; its weights are made to take gradients.
        temperature: What logits are divided by.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        self._model, self._temperature = model.requires_grad_(True), temperature
        self._parameters = list(model.parameters())
        self._sketch = Sketch(self._parameters)

    def of(self, task: SequenceTask, weightings: Sequence[Tensor]) -> tuple[Floats, list[Floats]]:
        """One forward pass, and a backward pass for each weighting that differs from the others.

        Args:
            task: The sequence.
            weightings: W times `[T]` weights of its counted tokens.

        Returns:
            `[T]` log-probs of the counted tokens, nats, and W projections `[K]` of ∇ Σ_t w_t log π(y_t).
        """
        device = self._parameters[0].device
        batch = Batch.of([task.prompt], [task.response], device)
        with torch.enable_grad():
            every, _ = token_logprobs(self._model, batch, self._temperature)
            logprobs = every[0][torch.from_numpy(task.positions).to(device)]
        found: dict[bytes, Floats] = {}
        for weights in weightings:
            key = weights.numpy().tobytes()
            if key not in found:
                given = weights.to(device, logprobs.dtype)
                gradients = torch.autograd.grad(logprobs, self._parameters, given, retain_graph=True, allow_unused=True)
                found[key] = self._sketch.project(gradients)
                del gradients
        ours = logprobs.detach().double().cpu().numpy()
        return ours, [found[weights.numpy().tobytes()] for weights in weightings]


def sequence_vectors(gradients: WeightedGradients, task: SequenceTask) -> Vectors:
    """Every correction of one sequence, with the log-probs of each trainer."""
    rollout = torch.from_numpy(task.rollout)[None]
    mask = torch.ones_like(rollout, dtype=torch.bool)
    tables = {
        (name, trainer): correction_weights(spec, torch.from_numpy(logprobs)[None], rollout, mask)
        for name, spec in CORRECTIONS.items()
        for trainer, logprobs in task.trainers.items()
    }
    # One weight a sequence needs no backward pass of its own.
    of_tokens = {key: table[0] for key, table in tables.items() if not CORRECTIONS[key[0]].per_sequence}
    plain = torch.ones(len(task.rollout), dtype=torch.float64)
    logprobs, (score, *others) = gradients.of(task, [plain, *of_tokens.values()])
    return Vectors(
        score=score,
        of_tokens=dict(zip(of_tokens, others, strict=True)),
        weights={key: table[0].numpy() for key, table in tables.items()},
        logprobs=logprobs,
    )
