"""Projected gradients of weighted sums of a sequence's log-probs: the worker's task, and the file that it leaves.

A gradient has as many components as the model has weights, so only a projection of it is kept, by the count sketch of
Charikar, Chen and Farach-Colton (2002): each weight of the model is given one of K components and a random sign once
and for all, and a component is the signed sum of its weights' gradients. As a matrix it has one ±1 in each column, so
it costs one pass over the gradient instead of K. Inner products are kept in expectation, with a variance of at most
(|x|²|y|² + ⟨x, y⟩²)/K, as with K dense directions of random signs. Vectors that nearly agree share their error: that of
a cosine c is about (1 − c²)/√K.

Nothing here imports torch before the job runs.

Shape legend: `n` sequences, `T` counted response tokens of one, `K` components of a projection, `W` weightings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices
from mismatch_probe.engines.base import Channel, OnTrainer
from mismatch_probe.engines.events import Advance, Identity, Total
from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.metrics.gradient import Weighted
from mismatch_probe.runs.measurements import Measurement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Floats = NDArray[np.float64]
DIRECTIONS = 1 << 14
# Before the first update π′ is π, so that clips of π/π′ touch nothing, and a correction alone tells algorithms apart.
WEIGHTED = tuple(found for found in CORRECTIONS.values() if found.level != "geometric")
# A correction, and the trainer pass whose log-probs make its weights.
Weighting = tuple[str, str]
_SEED = 0
# Elements that are at hand in float64 at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class SequenceTask:
    """One sequence.

    Attributes:
        prompt, response: Token ids.
        positions: `[T]` which response tokens count.
        rollout: `[T]` log μ of them, nats.
        trainers: `[T]` log π of them, nats, by trainer pass.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    positions: NDArray[np.int64]
    rollout: Floats
    trainers: Mapping[str, Floats]


@dataclass(frozen=True)
class Vectors:
    """What comes of a sequence.

    Attributes:
        score: `[K]` projection of ∇ Σ log π(y_t).
        of_tokens: `[K]` of ∇ Σ w_t log π(y_t), for the corrections that weight tokens.
        weights: `[T]` weights, or `[1]`, of every correction.
        logprobs: `[T]` log π of this forward pass, nats.
    """

    score: Floats
    of_tokens: dict[Weighting, Floats]
    weights: dict[Weighting, Floats]
    logprobs: Floats


@dataclass(frozen=True)
class PassTask:
    """The sequences of one rollout pass.

    Attributes:
        file: Where the vectors go.
        sequences: `n` of them.
        reference: The trainer pass in FP32.
    """

    file: Measurement
    sequences: Sequence[SequenceTask]
    reference: str

    @property
    def weightings(self) -> list[Weighting]:
        """Every correction with every trainer."""
        return [(correction.name, trainer) for correction in WEIGHTED for trainer in self.sequences[0].trainers]


@dataclass(frozen=True)
class PassVectors:
    """The projected gradients of a rollout pass, in float32, whose rounding is far below the projection's own error.

    Attributes:
        score: `[n, K]` without weights.
        of_tokens: `[n, K]` of the corrections that weight tokens.
        sums: `[3, n]` of every correction: number of weights, Σ (w − 1), Σ (w − 1)².
        logprob_gap: Largest |d| of this forward pass against the run's FP32 trainer pass, nats.
    """

    score: NDArray[np.float32]
    of_tokens: Mapping[Weighting, NDArray[np.float32]]
    sums: Mapping[Weighting, Floats]
    logprob_gap: float

    @classmethod
    def of(cls, rows: Sequence[Vectors], task: PassTask) -> PassVectors:
        """From `n` rows in the order of the task's sequences."""
        gaps = [row.logprobs - s.trainers[task.reference] for row, s in zip(rows, task.sequences, strict=True)]
        with np.errstate(over="ignore"):
            return cls(
                np.stack([row.score for row in rows]).astype(np.float32),
                {key: np.stack([row.of_tokens[key] for row in rows]).astype(np.float32) for key in rows[0].of_tokens},
                {key: np.stack([_sums(row.weights[key]) for row in rows], axis=1) for key in rows[0].weights},
                float(np.abs(np.concatenate(gaps)).max()),
            )

    def weighted(self, weighting: Weighting) -> Weighted:
        """The vectors and weights of a correction, in float64."""
        n_weights, excess, squares = self.sums[weighting]
        own = self.of_tokens.get(weighting)
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = (1 + excess)[:, None] * self.score if own is None else own.astype(np.float64)
        return Weighted(vectors, n_weights, excess, squares)

    def save(self, task: PassTask) -> None:
        """Writes the task's file."""
        arrays: dict[str, Any] = {"score": self.score}
        for index, (weighting, sums) in enumerate(self.sums.items()):
            arrays[f"sums-{index}"] = sums
            if weighting in self.of_tokens:
                arrays[f"vectors-{index}"] = self.of_tokens[weighting]
        facts = {"weightings": list(self.sums), "logprob_gap": self.logprob_gap}
        task.file.save(facts, arrays)

    @classmethod
    def load(cls, task: PassTask) -> PassVectors | None:
        """Reads the task's file; None where there is none, it is damaged, or it was made of something else."""
        found = task.file.load()
        if found is None:
            return None
        facts, arrays = found
        weightings = dict(enumerate(task.weightings))
        if facts.get("weightings") != [list(weighting) for weighting in weightings.values()]:
            return None
        return cls(
            arrays["score"],
            {weighting: arrays[f"vectors-{i}"] for i, weighting in weightings.items() if f"vectors-{i}" in arrays},
            {weighting: arrays[f"sums-{i}"] for i, weighting in weightings.items()},
            float(facts["logprob_gap"]),
        )


def _sums(weights: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.array([len(weights), (weights - 1).sum(), ((weights - 1) ** 2).sum()])


class Sketch:
    """The projection, the same for every gradient of a model; 2 bytes for each of its weights.

    Args:
        parameters: Of the model, in their order.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        import torch

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
        import torch

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
        import torch

        from mismatch_probe.engines.logprobs import Batch, token_logprobs

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
    import torch

    from mismatch_probe.engines.corrections import correction_weights

    rollout = torch.from_numpy(task.rollout)[None]
    mask = torch.ones_like(rollout, dtype=torch.bool)
    weights: dict[Weighting, Tensor] = {}
    of_tokens: dict[Weighting, Tensor] = {}
    for correction in WEIGHTED:
        for trainer, logprobs in task.trainers.items():
            key = correction.name, trainer
            weights[key] = correction_weights(correction, torch.from_numpy(logprobs)[None], rollout, mask)[0][0]
            # One weight a sequence needs no backward pass of its own.
            if correction.level == "token":
                of_tokens[key] = weights[key]
    plain = torch.ones(len(task.rollout), dtype=torch.float64)
    found, (score, *others) = gradients.of(task, [plain, *of_tokens.values()])
    return Vectors(
        score=score,
        of_tokens=dict(zip(of_tokens, others, strict=True)),
        weights={key: given.numpy() for key, given in weights.items()},
        logprobs=found,
    )


@dataclass(frozen=True)
class GradientJob(OnTrainer):
    """Makes the files of some rollout passes, one sequence at a time.

    Attributes:
        trainer: The trainer in FP32; its requests are left empty.
        passes: What to make.
    """

    passes: Sequence[PassTask]
    subject: ClassVar[str] = "The gradient pass"
    memory_advice: ClassVar[str] = "Compare with a lower --max-tokens, or use a machine with more memory."

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in sequences."""
        with self.trainer.started() as engine:
            gradients = engine.run_on_model(lambda model: WeightedGradients(model, self.trainer.temperature))
            channel.phase("load")
            channel.send(Identity(engine.identity() | devices.running()))
            channel.send(Total(sum(len(task.sequences) for task in self.passes)))
            for task in self.passes:
                rows = []
                for sequence in task.sequences:
                    rows.append(sequence_vectors(gradients, sequence))
                    channel.send(Advance(1))
                PassVectors.of(rows, task).save(task)
            channel.phase("gradients")
