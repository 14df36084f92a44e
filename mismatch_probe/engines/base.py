"""What an engine is: a few methods, and the jobs that a worker process hands to it.

An engine sees token ids only. It is built from a job, does its work, says what it is, and is closed with its process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.types import (
    Dtype,
    Prompt,
    Rollout,
    RolloutRequest,
    Sampling,
    Score,
    ScoreRequest,
    TrainerDtype,
    TrainerLayout,
    TrainerMode,
)


@dataclass(frozen=True)
class EncodeJob:
    """Encode prompts once, with the model's own tokenizer and chat template; decode ids that somebody else made."""

    model_path: str
    prompts: Sequence[Prompt]
    chat: bool
    trust_remote_code: bool
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Capture:
    """Full rows of logits to keep while a rollout runs.

    Attributes:
        path: The file, see `engines.rows`; made by the engine.
        rows: How many at most.
        positions: Which ones: by sequence and position the weight and what it stands for, see `engines.rows`, which
            chooses for itself where this is None.
    """

    path: str
    rows: int
    positions: Mapping[int, Mapping[int, tuple[float, float]]] | None = None


@dataclass(frozen=True)
class RolloutJob:
    """Sample (or decode again) every request, at most `batch` at once; then the first `self_noise_tokens` tokens of the
    first batch once more. With `logit_noise` requests may ask for noise, and none keeps rows or replays.
    """

    engine: str
    model_path: str
    dtype: Dtype
    device: str
    sampling: Sampling
    requests: Sequence[RolloutRequest]
    batch: int
    self_noise_tokens: int
    max_model_len: int
    capture: Capture | None = None
    logit_noise: bool = False
    in_process: bool = True
    trust_remote_code: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExactPosition:
    """A position at which the trainer's row is compared with a row that a rollout pass kept.

    Attributes:
        source: Index into `TrainerJob.exact_sources`.
        sequence_id: The sequence as the rollout pass names it.
        position: Index in the response.
        slot: Where the row lies in the source.
        weight: Its weight in the sample of positions, and `stands_for` how many positions it stands for, see
            `engines.rows`.
    """

    source: int
    sequence_id: int
    position: int
    slot: int
    weight: float
    stands_for: float

    def facts(self) -> dict[str, NDArray[Any]]:
        """What a comparison says of the position, as columns of one row; the slot was only where to find it."""
        return {name: np.array([value]) for name, value in vars(self).items() if name != "slot"}


@dataclass(frozen=True)
class TrainerJob:
    """Score every request; then the first batches, `self_noise_sequences` sequences or more, again."""

    engine: str
    model_path: str
    dtype: TrainerDtype
    mode: TrainerMode
    layout: TrainerLayout
    attention: str | None
    device: str
    temperature: float
    requests: Sequence[ScoreRequest]
    self_noise_sequences: int
    memory_budget: int
    exact_sources: Sequence[str] = ()
    exact: Mapping[int, Sequence[ExactPosition]] = field(default_factory=dict)
    trust_remote_code: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)


class OwnJob(Protocol):
    """A job of a layer above, which brings what the worker process is to do."""

    @property
    def subject(self) -> str:
        """The job as the subject of a sentence."""

    @property
    def model_path(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def memory_advice(self) -> str:
        """A sentence on what to lower where memory runs out."""

    def run(self, channel: Any) -> None:
        """Does it, in the worker process; `channel` takes events (`send`) and ends phases (`phase`)."""


@dataclass(frozen=True)
class OnTrainer:
    """What an `OwnJob` on a trainer knows of its model.

    Attributes:
        trainer: The trainer, its requests left empty.
    """

    trainer: TrainerJob

    @property
    def model_path(self) -> str:
        return self.trainer.model_path

    @property
    def trust_remote_code(self) -> bool:
        return self.trainer.trust_remote_code


class RolloutEngine(Protocol):
    """The sampling side, μ."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
    ) -> list[Rollout]:
        """Samples one response per request, or decodes the one it brings; all of them in the engine at once, from an
        empty prefix cache.

        Args:
            requests: What to sample or to decode.
            sampling: Distribution and length.
            on_tokens: Called with the number of tokens that each step made.
            capture: Which rows of logits are kept; none for None.

        Returns:
            Responses in the order of the requests; log-probs are those of the distribution that was sampled from.
        """

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own."""

    def identity(self) -> dict[str, Any]:
        """Versions, dtype, flags and backends, for the manifest."""

    def close(self) -> None:
        """Frees the device; the engine is not used again."""


class TrainerEngine(Protocol):
    """The training side, π."""

    def plan(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        """Splits the requests into batches that fit the memory budget."""

    def score(self, batch: Sequence[ScoreRequest], temperature: float, *, exact: bool = False) -> list[Score]:
        """Log-probs of the response tokens of one planned batch; with `exact` also what the job's rows are compared
        with.
        """

    def identity(self) -> dict[str, Any]:
        """Versions, dtype, flags and backends, for the manifest."""

    def close(self) -> None:
        """Frees the device; the engine is not used again."""
