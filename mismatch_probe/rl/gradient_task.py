"""Projected gradients of a run's sequences: what is asked of the worker process, and the file that it leaves.

Shape legend: `n` sequences, `T` counted response tokens of one, `K` components of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.arrays import load_arrays, save_arrays
from mismatch_probe.metrics.gradient import Weighted

Floats = NDArray[np.float64]
DIRECTIONS = 1 << 14
# A correction, and the trainer pass whose log-probs make its weights.
Weighting = tuple[str, str]


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
        path: The file to write.
        key: Of all that the file depends on.
        sequences: `n` of them.
        reference: The trainer pass in FP32.
    """

    path: str
    key: str
    sequences: Sequence[SequenceTask]
    reference: str


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

    def save(self, path: Path, key: str) -> None:
        """Writes the file."""
        arrays: dict[str, Any] = {"score": self.score}
        for index, (weighting, sums) in enumerate(self.sums.items()):
            arrays[f"sums-{index}"] = sums
            if weighting in self.of_tokens:
                arrays[f"vectors-{index}"] = self.of_tokens[weighting]
        save_arrays(path, key, {"weightings": list(self.sums), "logprob_gap": self.logprob_gap}, arrays)

    @classmethod
    def load(cls, path: Path, key: str) -> PassVectors | None:
        """Reads the file; None where there is none, it is damaged, or it was made of something else."""
        found = load_arrays(path, key)
        if found is None:
            return None
        facts, arrays = found
        weightings = {index: (str(name), str(trainer)) for index, (name, trainer) in enumerate(facts["weightings"])}
        return cls(
            arrays["score"],
            {weighting: arrays[f"vectors-{i}"] for i, weighting in weightings.items() if f"vectors-{i}" in arrays},
            {weighting: arrays[f"sums-{i}"] for i, weighting in weightings.items()},
            float(facts["logprob_gap"]),
        )


def _sums(weights: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.array([len(weights), (weights - 1).sum(), ((weights - 1) ** 2).sum()])
