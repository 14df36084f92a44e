"""The child's side of an engine process: `python -m mismatch_probe.engines.worker FD KIND`.

It imports what its engine needs, receives one job, sends events (`engines.events`), and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from mismatch_probe.engines import faults, registry
from mismatch_probe.engines.base import Job
from mismatch_probe.engines.events import Done, Event, Failed, Phase
from mismatch_probe.engines.process import ENCODE
from mismatch_probe.errors import ProbeError


class _ParentGone(BaseException):
    """The parent has ended, and with it the reason to go on."""


class _Channel:
    """The parent, and a clock for phases."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since = time.perf_counter()

    def send(self, event: Event) -> None:
        try:
            self._connection.send(event)
        except OSError:
            raise _ParentGone from None

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise _ParentGone from None

    def phase(self, name: str) -> None:
        """Ends a phase: everything since the last one took this long."""
        now = time.perf_counter()
        self.send(Phase(name, now - self._since))
        self._since = now


def _serve(channel: _Channel, kind: str) -> None:
    """Does one job; what fails is reported to the parent."""
    job: Job | None = None
    try:
        # An import that fails, in whatever way, is reported as the job's failure, in the job's terms.
        failure: Exception | None = None
        try:
            if kind != ENCODE:
                registry.find(kind).import_ahead()
        except Exception as error:
            failure = error
        channel.phase("import")
        job = channel.receive()
        channel.phase("wait")
        if isinstance(failure, ProbeError):
            raise failure
        if failure is not None:
            raise ImportError(faults.first_line(failure)) from failure
        job.run(channel)
        channel.send(Done())
    except _ParentGone:
        raise
    except BaseException as error:
        traceback.print_exc()
        known = faults.classify(error, job) if job is not None else None
        channel.send(Failed(known or faults.first_line(error)))


def main(arguments: list[str]) -> None:
    with contextlib.suppress(_ParentGone):
        _serve(_Channel(Connection(int(arguments[0]))), arguments[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # All that matters has been sent and closed. vLLM's own processes, which are of this one's session, must not outlive
    # it: the parent would end them, but may be gone by now. It also skips a tear-down in which vLLM spends seconds.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
