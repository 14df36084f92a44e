"""Toy policies over a small vocabulary, whose distributions are known to the last digit, and faults planted in them.

A token's logits are random, with a width that varies from token to token, so that some tokens are certain and others
are not. The trainer's logits are the engine's and noise. A fault is what it is in the world: another temperature, a
smaller support, another row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.chunks import Unusable
from mismatch_probe.probes.diagnose.evidence import Evidence

Floats = NDArray[np.float64]
VOCABULARY = 48


def log_softmax(logits: Floats) -> Floats:
    top = logits - logits.max(-1, keepdims=True)
    return np.asarray(top - np.log(np.exp(top).sum(-1, keepdims=True)))


@dataclass
class Toy:
    """Sampled tokens with both policies' logits.

    Attributes:
        engine: `[N, V]` logits of the policy that samples.
        trainer: `[N, V]` logits of the trainer.
        ids: `[N]` sampled ids.
        sequence, position: `[N]`
        rows: Columns by sequence.
        tokens: Columns by token.
    """

    engine: Floats
    trainer: Floats
    ids: NDArray[np.int64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    rng: np.random.Generator
    rollout_logprobs: Floats = field(default_factory=lambda: np.empty(0))
    trainer_logprobs: Floats = field(default_factory=lambda: np.empty(0))
    rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: dict[str, NDArray[Any]] = field(default_factory=dict)
    prompt: NDArray[np.int64] | None = None

    @property
    def n_sequences(self) -> int:
        return len(self.prompt_length)

    def chosen(self, logits: Floats) -> Floats:
        """`[N]` log-probs of the sampled ids."""
        return log_softmax(logits)[np.arange(len(self.ids)), self.ids]

    def evidence(self) -> Evidence:
        b = self.rollout_logprobs if len(self.rollout_logprobs) else self.chosen(self.engine)
        a = self.trainer_logprobs if len(self.trainer_logprobs) else self.chosen(self.trainer)
        lengths = np.bincount(self.sequence, minlength=self.n_sequences)
        again = np.array([int((self.ids[i - self.position[i] : i] == self.ids[i]).sum()) for i in range(len(self.ids))])
        version = self.tokens.get("weight_version")
        return Evidence(
            rollout=b,
            trainer=a,
            unusable=Unusable.of(b, a, self.sequence, self.position, version).any,
            ids=self.ids,
            position=self.position,
            sequence=self.sequence,
            tokens=self.tokens,
            rows=self.rows,
            labels=self.labels,
            prompt=np.arange(self.n_sequences) if self.prompt is None else self.prompt,
            prompt_length=self.prompt_length,
            length=lengths,
            seen=again > 0,
            again=again,
            places=tuple(f"toy:{i + 1}" for i in range(self.n_sequences)),
        )


def toy(seed: int = 0, n_sequences: int = 48, length: int = 60, noise: float = 0.03, temperature: float = 1.0) -> Toy:
    """Sequences sampled at a temperature; both sides score at 1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, n_sequences)
    n = int(lengths.sum())
    width = np.exp(rng.normal(0.9, 0.7, n))[:, None]
    engine = rng.standard_normal((n, VOCABULARY)) * width
    sampled = sample(rng, engine / temperature)
    return Toy(
        engine=engine,
        trainer=engine + noise * rng.standard_normal((n, VOCABULARY)) * np.exp(0.3 * rng.standard_normal((n, 1))),
        ids=sampled,
        sequence=np.repeat(np.arange(n_sequences), lengths),
        position=np.concatenate([np.arange(one) for one in lengths]),
        prompt_length=rng.integers(8, 40, n_sequences),
        rng=rng,
    )


def sample(rng: np.random.Generator, logits: Floats) -> NDArray[np.int64]:
    """`[N]` an id of each row, by the Gumbel maximum."""
    return np.asarray((logits + rng.gumbel(size=logits.shape)).argmax(-1), np.int64)


def resampled(one: Toy, engine: Floats) -> Toy:
    """The same with ids that another engine samples."""
    return replace(one, engine=engine, ids=sample(one.rng, engine))


def moved(one: Toy, size: float, where: NDArray[np.bool_] | None = None) -> Toy:
    """The engine has other weights, and samples from them, at some tokens."""
    change = size * one.rng.standard_normal(one.engine.shape)
    engine = one.engine + (change if where is None else np.where(where[:, None], change, 0.0))
    return resampled(one, engine)


__all__ = ["VOCABULARY", "Toy", "log_softmax", "moved", "resampled", "sample", "toy"]
