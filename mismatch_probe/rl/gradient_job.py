"""Projected gradients of a run's sequences: what is asked of the worker process, and the file that it leaves.

Nothing here imports torch before the job runs.

Shape legend: `n` sequences, `T` counted response tokens of one, `K` components of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.arrays import load_arrays, save_arrays
from mismatch_probe.engines.base import OnTrainer
from mismatch_probe.metrics.gradient import Weighted

Floats = NDArray[np.float64]
DIRECTIONS = 1 << 14
# A correction by the log-probs of a trainer pass.
Arm = tuple[str, str]


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
    of_tokens: dict[Arm, Floats]
    weights: dict[Arm, Floats]
    logprobs: Floats


@dataclass(frozen=True)
class PassTask:
    """The sequences of one rollout pass.

    Attributes:
        path: The file to write.
        key: Of all that the file depends on.
        sequences: `n` of them.
        consistent: The trainer pass in FP32.
    """

    path: str
    key: str
    sequences: Sequence[SequenceTask]
    consistent: str


@dataclass(frozen=True)
class GradientJob(OnTrainer):
    """Makes the files of some rollout passes, one sequence at a time.

    Attributes:
        trainer: The trainer in FP32; its requests are left empty.
        passes: What to make.
    """

    passes: Sequence[PassTask]
    subject: str = field(default="The gradient pass", init=False)
    memory_advice: str = field(default="Compare with a lower --max-tokens.", init=False)

    def run(self, channel: Any) -> None:
        """Events: `identity`, `total` and `progress` in sequences."""
        from mismatch_probe.engines import devices
        from mismatch_probe.engines.hf import HfTrainer
        from mismatch_probe.rl.gradient_vectors import WeightedGradients, sequence_vectors

        engine = HfTrainer(self.trainer)
        gradients = WeightedGradients(engine.model, self.trainer.temperature)
        channel.phase("load")
        channel.send("identity", engine.identity() | devices.running())
        channel.send("total", sum(len(task.sequences) for task in self.passes))
        for task in self.passes:
            rows = []
            for sequence in task.sequences:
                rows.append(sequence_vectors(gradients, sequence))
                channel.send("progress", 1)
            PassVectors.of(rows, task).save(Path(task.path), task.key)
        channel.phase("gradients")
        engine.close()


@dataclass(frozen=True)
class PassVectors:
    """The projected gradients of a rollout pass, in float32, whose rounding is far below the projection's own error.

    Attributes:
        score: `[n, K]` without weights.
        of_tokens: `[n, K]` of the corrections that weight tokens.
        sums: `[3, n]` of every correction: number of weights, Σ (w − 1), Σ (w − 1)².
        logprob_gap: Largest |Δlogp| of this forward pass against the run's FP32 trainer pass, nats.
    """

    score: NDArray[np.float32]
    of_tokens: Mapping[Arm, NDArray[np.float32]]
    sums: Mapping[Arm, Floats]
    logprob_gap: float

    @classmethod
    def of(cls, rows: Sequence[Vectors], task: PassTask) -> PassVectors:
        """From `n` rows in the order of the task's sequences."""
        gaps = [row.logprobs - s.trainers[task.consistent] for row, s in zip(rows, task.sequences, strict=True)]
        with np.errstate(over="ignore"):
            return cls(
                np.stack([row.score for row in rows]).astype(np.float32),
                {arm: np.stack([row.of_tokens[arm] for row in rows]).astype(np.float32) for arm in rows[0].of_tokens},
                {arm: np.stack([_sums(row.weights[arm]) for row in rows], axis=1) for arm in rows[0].weights},
                float(np.abs(np.concatenate(gaps)).max()),
            )

    def weighted(self, arm: Arm) -> Weighted:
        """The vectors and weights of a correction, in float64."""
        n_weights, excess, squares = self.sums[arm]
        own = self.of_tokens.get(arm)
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = (1 + excess)[:, None] * self.score if own is None else own.astype(np.float64)
        return Weighted(vectors, n_weights, excess, squares)

    def save(self, path: Path, key: str) -> None:
        """Writes the file."""
        arrays: dict[str, Any] = {"score": self.score}
        for index, (arm, sums) in enumerate(self.sums.items()):
            arrays[f"sums-{index}"] = sums
            if arm in self.of_tokens:
                arrays[f"vectors-{index}"] = self.of_tokens[arm]
        save_arrays(path, key, {"arms": list(self.sums), "logprob_gap": self.logprob_gap}, arrays)

    @classmethod
    def load(cls, path: Path, key: str) -> PassVectors | None:
        """Reads the file; None where there is none, it is damaged, or it was made of something else."""
        found = load_arrays(path, key)
        if found is None:
            return None
        facts, arrays = found
        arms = {index: (str(arm[0]), str(arm[1])) for index, arm in enumerate(facts["arms"])}
        return cls(
            arrays["score"],
            {arm: arrays[f"vectors-{i}"] for i, arm in arms.items() if f"vectors-{i}" in arrays},
            {arm: arrays[f"sums-{i}"] for i, arm in arms.items()},
            float(facts["logprob_gap"]),
        )


def _sums(weights: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.array([len(weights), (weights - 1).sum(), ((weights - 1) ** 2).sum()])
