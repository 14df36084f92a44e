"""Which process does which job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from mismatch_probe.engines.base import Channel, Job
from mismatch_probe.engines.devices import EngineSettings
from mismatch_probe.engines.events import Texts
from mismatch_probe.errors import EngineError
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.workers import Wanted, Workers

REUSABLE: Wanted = ("scripted", EngineSettings(reusable=True))
OTHER: Wanted = ("scripted", EngineSettings(environment={"OTHER": "1"}, reusable=True))
ALONE: Wanted = ("scripted", EngineSettings())


@dataclass(frozen=True)
class WhoAmI:
    """Tells its process."""

    fails: bool = False
    subject: ClassVar[str] = "It"
    model_path: ClassVar[str] = ""
    trust_remote_code: ClassVar[bool] = False
    memory_advice: ClassVar[str] = ""

    def run(self, channel: Channel) -> None:
        import os

        if self.fails:
            raise EngineError("It fails.")
        channel.send(Texts({os.getpid(): os.environ.get("OTHER", "")}))


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    with Workers(tmp_path) as found:
        yield found


def pid(workers: Workers, wanted: Wanted, *later: Wanted, job: Job = WhoAmI()) -> int:
    """The process that does the job; `later` are the processes of the jobs that follow."""
    ((found, _),) = workers.run(wanted, "job", job, Progress(), later).texts.items()
    return found


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_a_reusable_one_goes_on_past_others(workers: Workers) -> None:
    first = pid(workers, REUSABLE, OTHER, OTHER, REUSABLE)
    second = pid(workers, OTHER, OTHER, REUSABLE)
    assert first != second == pid(workers, OTHER, REUSABLE)
    assert alive(first)
    assert not alive(second)  # nothing that follows wants it
    assert pid(workers, REUSABLE) == first
    assert not alive(first)


def test_one_that_is_not_reusable_does_one_job(workers: Workers) -> None:
    first = pid(workers, ALONE, ALONE)
    assert not alive(first)
    assert pid(workers, ALONE) != first


def test_the_environment_is_its_own(workers: Workers) -> None:
    assert list(workers.run(OTHER, "job", WhoAmI(), Progress()).texts.values()) == ["1"]
    changed = (REUSABLE[0], replace(REUSABLE[1], environment={"OTHER": "2"}))
    assert list(workers.run(changed, "job", WhoAmI(), Progress()).texts.values()) == ["2"]


def test_a_failure_costs_one_job(workers: Workers) -> None:
    first = pid(workers, REUSABLE, REUSABLE, REUSABLE)
    with pytest.raises(EngineError, match="It fails"):
        pid(workers, REUSABLE, REUSABLE, job=WhoAmI(fails=True))
    assert not alive(first)
    assert pid(workers, REUSABLE) != first


def test_what_was_to_follow_ends_with_the_workers(tmp_path: Path) -> None:
    with Workers(tmp_path) as workers:
        waiting = pid(workers, REUSABLE, OTHER, REUSABLE)
    assert not alive(waiting)
