"""Worker processes as probes use them: one at work, the next one importing, events added up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mismatch_probe.engines.base import Job
from mismatch_probe.engines.devices import EngineSettings
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


# What a job needs of its process: the engine that is imported, and the settings.
Wanted = tuple[str, EngineSettings]


class Workers:
    """The worker processes of a run of passes: one at work, and those that wait for a later job.

    The process of the next job starts while the present one works. Importing is all that it does before it gets its
    job, so engines still follow one another. A process whose settings are `reusable` goes on with later jobs.

    Args:
        logs: Folder for their output.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._waiting: dict[_Key, EngineProcess] = {}
        self._at_work: EngineProcess | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._waiting.values(), *([self._at_work] if self._at_work is not None else [])):
            process.close()

    def run(self, wanted: Wanted, name: str, job: Job, progress: Progress, later: Sequence[Wanted] = ()) -> Collected:
        """Runs one job to its end and returns what it produced.

        Args:
            wanted: Its process.
            name: Of its progress.
            job: What to do.
            progress: Told about it.
            later: Processes of the jobs that follow, in order.

        Raises:
            ProbeError: What `EngineProcess.run` raises.
        """
        settings = wanted[1]
        key, keys = _key(wanted), [_key(one) for one in later]
        process = self._at_work = self._waiting.pop(key, None) or self._start(wanted)
        for old in [old for old in self._waiting if old not in keys]:
            self._waiting.pop(old).close()
        stays = settings.reusable and key in keys
        if later and keys[0] not in self._waiting and not (stays and keys[0] == key):
            self._waiting[keys[0]] = self._start(later[0])
        collected = drive(process, name, job, progress, last=not stays)
        if stays:
            self._waiting[key] = process
        return collected

    def _start(self, wanted: Wanted) -> EngineProcess:
        kind, settings = wanted
        return EngineProcess(kind, settings.environment, self._logs / f"{kind}.log")


_Key = tuple[str, frozenset[tuple[str, str]]]


def _key(wanted: Wanted) -> _Key:
    """Jobs of equal keys can follow one another in a process."""
    kind, settings = wanted
    return kind, frozenset(settings.environment.items())


def told(progress: Progress, name: str, event: Event) -> None:
    """Moves a pass's progress."""
    match event:
        case Total():
            progress.total(name, event.amount)
        case Advance():
            progress.advance(name, event.amount)


def drive(process: EngineProcess, pass_id: str, job: Job, progress: Progress, *, last: bool = True) -> Collected:
    """Runs one job to its end and returns what it produced; `last` as in `EngineProcess.run`.

    Raises:
        ProbeError: What `EngineProcess.run` raises.
    """
    collected = Collected()
    progress.begin(pass_id, pass_id)
    started = time.perf_counter()

    def on_event(event: Event) -> None:
        told(progress, pass_id, event)
        collected.add(event)

    process.run(job, on_event, last=last)
    progress.end(pass_id, f"done in {time.perf_counter() - started:.0f} s")
    return collected
