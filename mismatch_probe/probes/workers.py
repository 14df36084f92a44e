"""Worker processes as a comparison uses them: one at work, the next one importing, events added up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mismatch_probe.engines.base import Job
from mismatch_probe.engines.events import Advance, Encoded, Event, Identity, Phase, Rollouts, Scores, Texts, Total
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.probes.progress import Progress
from mismatch_probe.types import EncodedPrompt, Rollout, Score


@dataclass
class Collected:
    """What a worker's events add up to."""

    encoded: list[EncodedPrompt] = field(default_factory=list)
    special: list[int] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    self_noise_rollouts: list[Rollout] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    self_noise_scores: list[Score] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Takes what an event brings."""
        match event:
            case Encoded():
                self.encoded.extend(event.prompts)
                self.texts.update(event.texts)
                self.special.extend(event.special)
            case Rollouts():
                (self.self_noise_rollouts if event.again else self.rollouts).extend(event.rollouts)
            case Scores():
                (self.self_noise_scores if event.again else self.scores).extend(event.scores)
            case Texts():
                self.texts.update(event.texts)
            case Identity():
                self.identity.update(event.facts)
            case Phase():
                self.timings[event.name] = round(event.seconds, 3)


class Workers:
    """Starts worker processes, one ahead: the next one imports its packages while the present one works.

    Importing is all that it does before it gets its job, so engines still follow one another.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._ahead: tuple[str, Mapping[str, str], EngineProcess] | None = None
        self._at_work: EngineProcess | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead[2].close()
        if self._at_work is not None:
            self._at_work.close()

    def prepare(self, kind: str, environment: Mapping[str, str]) -> None:
        if self._ahead is None:
            self._ahead = (kind, environment, self._start(kind, environment))

    def take(self, kind: str, environment: Mapping[str, str]) -> EngineProcess:
        """The process for the next job: the one that was started ahead where it is of the right kind."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (kind, environment):
            self._at_work = ahead[2]
        else:
            if ahead is not None:
                ahead[2].close()
            self._at_work = self._start(kind, environment)
        return self._at_work

    def _start(self, kind: str, environment: Mapping[str, str]) -> EngineProcess:
        return EngineProcess(kind, environment, self._logs / f"{kind}.log")


def told(progress: Progress, name: str, event: Event) -> None:
    """Moves a pass's progress."""
    match event:
        case Total():
            progress.total(name, event.amount)
        case Advance():
            progress.advance(name, event.amount)


def drive(process: EngineProcess, pass_id: str, job: Job, progress: Progress) -> Collected:
    """Runs one job to its end and returns what it produced.

    Raises:
        ProbeError: What `EngineProcess.run` raises.
    """
    collected = Collected()
    progress.begin(pass_id, pass_id)
    started = time.perf_counter()

    def on_event(event: Event) -> None:
        told(progress, pass_id, event)
        collected.add(event)

    process.run(job, on_event)
    progress.end(pass_id, f"done in {time.perf_counter() - started:.0f} s")
    return collected
