"""What a worker process tells its parent: small values, told apart by their class.

Who listens matches on the classes that it knows and leaves the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch_probe.errors import ProbeError
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.rl_run import Ending
from mismatch_probe.types import EncodedPrompt, Rollout, Score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Event:
    """Base of all events."""


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Total(Event):
    """The job's work is known, in units of its own (tokens, sequences, passes, steps)."""

    amount: int


@dataclass(frozen=True)
class Advance(Event):
    """So many more units are done."""

    amount: int


@dataclass(frozen=True)
class Phase(Event):
    """A phase has ended."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Identity(Event):
    """Versions, dtype, flags and backends of an engine, and the machine that it runs on."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Encoded(Event):
    """What a tokenizer gives.

    Attributes:
        prompts: Each with its ids.
        texts: The text of each of the job's token ids, on its own.
        special: Ids of special tokens.
    """

    prompts: Sequence[EncodedPrompt]
    texts: Mapping[int, str]
    special: Sequence[int]


@dataclass(frozen=True)
class Texts(Event):
    """The text of tokens, each on its own."""

    texts: Mapping[int, str]


@dataclass(frozen=True)
class Rollouts(Event):
    """Responses of a rollout engine; `again` where they are the self-noise repeat."""

    rollouts: Sequence[Rollout]
    again: bool = False


@dataclass(frozen=True)
class Scores(Event):
    """Log-probs of a trainer; `again` where they are the self-noise repeat."""

    scores: Sequence[Score]
    again: bool = False


@dataclass(frozen=True)
class Column(Event):
    """Log-probs `[N]` of recorded tokens under a change of a trainer's pass, nats.

    Attributes:
        name: Of the change.
        logprobs: Empty where it could not be made.
        facts: What else was kept of each token's row of logits, see `metrics.hypotheses.Rows`.
        seconds: What it took.
        why: Why there are none.
    """

    name: str
    logprobs: NDArray[np.float64]
    facts: Mapping[str, NDArray[Any]]
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class Done(Event):
    """The job has ended well; its last event."""


@dataclass(frozen=True)
class Failed(Event):
    """The job has failed; the last event of a process. `error` is a line of text where it is of no known kind."""

    error: ProbeError | str


@dataclass(frozen=True)
class InRun(Event):
    """An event of one of several RL runs that a process works through, named by its folder."""

    folder: str
    event: Event


@dataclass(frozen=True)
class RunBegins(Event):
    """An RL run begins, or goes on."""


@dataclass(frozen=True)
class StepDone(Event):
    """A step of an RL run: its row of `steps.parquet`."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Found(Event):
    """A finding that does not end an RL run."""

    finding: Finding


@dataclass(frozen=True)
class Message(Event):
    """A line for people."""

    text: str


@dataclass(frozen=True)
class RunEnded(Event):
    """An RL run has ended."""

    ending: Ending
