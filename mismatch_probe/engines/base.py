"""What an engine is: a few methods, and the jobs that a worker process does with it.

An engine sees token ids only. It is built from a job, does its work, says what it is, and is closed with its process.
Who works with engines knows these protocols; `registry.find` has the engine of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.attribute.trace import Routers, Routes, TraceRequest
from mismatch_probe.engines.events import Advance, Event, Identity, Rollouts, Scores, Texts, Total
from mismatch_probe.engines.rows import RowChoice, RowWriter
from mismatch_probe.errors import EngineError
from mismatch_probe.types import (
    Dtype,
    Rollout,
    RolloutRequest,
    Sampling,
    Score,
    ScoreRequest,
    TrainerDtype,
    TrainerLayout,
    TrainerMode,
)

if TYPE_CHECKING:
    import torch

Found = TypeVar("Found")
LESS_OR_MORE = "Lower --rollout-batch, --max-tokens or --num-prompts, or use a machine with more memory."


class Closing(Protocol):
    """An engine as a context: closed at the end of its work. One that failed ends with its process instead, since
    closing it could hide the failure, or hang.
    """

    def identity(self) -> dict[str, Any]:
        """Versions, dtype, flags and backends, for the manifest."""

    def close(self) -> None:
        """Frees the device; the engine is not used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


class RolloutEngine(Closing, Protocol):
    """The sampling side, μ. An engine derives from it, and overrides what it can do beyond sampling."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
    ) -> list[Rollout]:
        """Samples one response per request; all of them in the engine at once, from an empty prefix cache.

        Args:
            requests: What to sample.
            sampling: Distribution and length.
            on_tokens: Called with the number of tokens that each step made.
            capture: Which rows of logits are kept; none for None.

        Returns:
            Responses in the order of the requests; log-probs are those of the distribution that was sampled from.
        """

    def replay(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        capture: Capture | None = None,
        *,
        keep_cache: bool = False,
    ) -> list[Rollout]:
        """Decodes the responses that the requests bring, token by token as `generate` samples them, up to the length of
        `sampling`; with `keep_cache` from the prefix cache as earlier requests left it.
        """

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs at temperature 1, nats, of every token but the first of each sequence, by prefill from an empty
        prefix cache.
        """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces the model's weights in place.

        Args:
            weights: By the names of a checkpoint, whole.

        Raises:
            EngineError: The engine takes none of this family, or something is missing; its model is of no use any more.
        """

    def run_on_model(self, function: Callable[[Any], Found]) -> Found:
        """Runs a function of a module on the engine's own network, where that lives, and returns its answer; with
        several workers that of the first.
        """

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own."""

    def trace(self, request: TraceRequest) -> None:
        """Keeps what the network computes inside, of whole sequences, see `attribute.trace`."""
        raise EngineError("This engine does not show its layers.", "Use --no-layers.")

    def routes(self, sequences: Sequence[Sequence[int]], routers: Routers) -> Routes:
        """Scores sequences as `score` does, and keeps which experts each token was sent to."""
        raise EngineError("This engine does not show its routers.", "Leave the setting router out of --settings.")

    def generate_routed(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        routers: Routers,
    ) -> list[Rollout]:
        """Samples as `generate` does, the same bits, and keeps which experts each token was sent to meanwhile, where
        its routers can be seen.
        """
        raise EngineError("This engine does not show its routers.", "Leave --remedy out.")

    def configured(self) -> AbstractContextManager[None]:
        """Inside it models of transformers can be built in this process."""
        return nullcontext()


class TrainerEngine(Closing, Protocol):
    """The training side, π. Its network is in this process."""

    def plan(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
        """Splits the requests into batches that fit the memory budget."""

    def plan_as_rollout(
        self, requests: Sequence[ScoreRequest], most_tokens: int, most_rows: int
    ) -> list[list[ScoreRequest]]:
        """Splits the requests as a rollout engine's scheduler does: in their order, as many at once as it takes."""

    def score(self, batch: Sequence[ScoreRequest], temperature: float, *, exact: bool = False) -> list[Score]:
        """Log-probs of the response tokens of one planned batch; with `exact` also what the job's rows are compared
        with.
        """

    def rows(self, batch: Sequence[ScoreRequest]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The logits `[R, V]` that predict the response tokens of a batch, some rows at a time, each part with the
        index of its first row and with the tokens `[R]`.
        """
        raise EngineError("This engine does not show its logits.", "Name another one by --trainer-engine.")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrites parameters of the network, by its own names; the others stay."""

    def run_on_model(self, function: Callable[[Any], Found]) -> Found:
        """Runs a function on the network and returns its answer. None of the weights asks for gradients before."""

    def precision(self) -> AbstractContextManager[Any]:
        """What a forward pass in the job's dtype and mode runs under."""

    def head_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` that the model's own forward makes of the decoder's last states `[R, H]`."""

    def changed(self, *, layout: str | None = None, softmax_in_dtype: bool = False) -> AbstractContextManager[None]:
        """For the while: passes in another layout (`hf.layouts`), or the last log-softmax in the job's dtype.

        Raises:
            EngineError: The model does not support the layout.
        """


class Channel(Protocol):
    """The parent, as a job sees it."""

    def send(self, event: Event) -> None:
        """Tells the parent."""

    def phase(self, name: str) -> None:
        """Ends a phase: everything since the last one took this long."""


class Job(Protocol):
    """What a worker process does. A job travels to it as a pickle, so importing its module imports no engine."""

    @property
    def subject(self) -> str:
        """The job as the subject of a sentence."""

    @property
    def model_path(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def memory_advice(self) -> str:
        """A sentence on what to do where memory runs out."""

    def run(self, channel: Channel) -> None:
        """Does it, in the worker process."""


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

    def of(self, request: RolloutRequest, writer: RowWriter) -> RowChoice:
        """What is kept of a request."""
        only = None if self.positions is None else self.positions.get(request.sequence_id, {})
        return RowChoice(writer, request.sequence_id, request.seed, only)


@dataclass(frozen=True)
class RolloutJob:
    """Sample every request, at most `batch` at once, or decode again the responses that all of them bring; then the
    first `self_noise_tokens` tokens of the first batch once more. With `logit_noise` requests may ask for noise or
    a race, and none keeps rows or replays.
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

    @property
    def subject(self) -> str:
        return f"The {self.engine} rollout in {self.dtype}"

    @property
    def memory_advice(self) -> str:
        if self.device == "cuda":
            return "Lower --rollout-batch or --max-tokens, or set --engine-arg gpu_memory_utilization=0.7."
        return LESS_OR_MORE

    @property
    def replays(self) -> bool:
        """Whether the requests bring responses to decode again."""
        return any(len(request.forced_token_ids) for request in self.requests)

    def started(self) -> RolloutEngine:
        """The engine."""
        return registry.find(self.engine, "rollout").rollout(self)

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in tokens, `Rollouts`, `Texts`; phases load, first_step, generate,
        self_noise.
        """
        with self.started() as engine:
            channel.phase("load")
            channel.send(Identity(engine.identity() | devices.running()))
            decode = engine.replay if self.replays else engine.generate
            # The first batch runs alone, so that its repeat meets the same company; the rest is the scheduler's to
            # arrange.
            batches = [batch for batch in (self.requests[: self.batch], self.requests[self.batch :]) if batch]
            repeat = replace(self.sampling, max_tokens=min(self.self_noise_tokens, self.sampling.max_tokens))
            again = batches[0] if repeat.max_tokens else []
            channel.send(Total(_longest(self.requests, self.sampling) + _longest(again, repeat)))
            seen: set[int] = set()
            begun = False

            def on_tokens(made: int) -> None:
                nonlocal begun
                if not begun:
                    channel.phase("first_step")
                begun = True
                channel.send(Advance(made))

            for batch in batches:
                rollouts = decode(batch, self.sampling, on_tokens, self.capture)
                seen.update(int(token) for rollout in rollouts for token in rollout.response_token_ids)
                channel.send(Rollouts(rollouts))
                made = sum(len(r.response_token_ids) for r in rollouts)
                channel.send(Advance(_longest(batch, self.sampling) - made))
            channel.send(Texts(dict(zip(sorted(seen), engine.token_texts(sorted(seen)), strict=True))))
            channel.phase("generate")
            if again:
                channel.send(Rollouts(decode(again, repeat, lambda n: channel.send(Advance(n))), again=True))
                channel.phase("self_noise")


def _longest(requests: Sequence[RolloutRequest], sampling: Sampling) -> int:
    """Tokens of all responses if none ends early."""
    return sum(min(len(r.forced_token_ids) or sampling.max_tokens, sampling.max_tokens) for r in requests)


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
    memory_advice: ClassVar[str] = "Lower --memory-budget, or use --trainer-layout single, then continue with --resume."

    @property
    def subject(self) -> str:
        return f"The {self.engine} trainer in {self.dtype} ({self.mode})"

    def started(self) -> TrainerEngine:
        """The engine."""
        return registry.find(self.engine, "trainer").trainer(self)

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in tokens, `Scores`; phases load, first_step (a batch), score,
        self_noise.
        """
        with self.started() as engine:
            channel.phase("load")
            channel.send(Identity(engine.identity() | devices.running()))
            batches = engine.plan(self.requests)
            n_again = 0
            while n_again < len(batches) and sum(map(len, batches[:n_again])) < self.self_noise_sequences:
                n_again += 1
            channel.send(Total(sum(r.length for batch in [*batches, *batches[:n_again]] for r in batch)))
            for repeated, again in ((batches, False), (batches[:n_again], True)):
                for index, batch in enumerate(repeated):
                    channel.send(Scores(engine.score(batch, self.temperature, exact=not again), again))
                    channel.send(Advance(sum(r.length for r in batch)))
                    if index == 0 and not again:
                        channel.phase("first_step")
                channel.phase("self_noise" if again else "score")


@dataclass(frozen=True)
class OnTrainer:
    """What a job that works with a trainer knows of its model.

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
