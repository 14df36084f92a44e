"""The child's side of an engine process: `python -m mismatch_probe.engines.worker FD KIND`.

It imports what its engine needs, then does one job after another, sending events (`engines.events`), until one fails or
the parent has no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from mismatch_probe.errors import ProbeError


class _ParentGone(BaseException):
    """The parent has ended, or has no more to do."""


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


def _import_failure(kind: str) -> Exception | None:
    """Imports what the engine needs; what fails, in whatever way, is to be reported as the first job's failure."""
    try:
        registry.find(kind).import_ahead()
    except ProbeError as error:
        return error
    except Exception as error:
        failure = ImportError(faults.first_line(error))
        failure.__cause__ = error
        return failure
    return None


def _done(channel: _Channel, job: Job, failure: Exception | None) -> bool:
    """Does a job, and says whether that went well; what fails is reported to the parent."""
    try:
        if failure is not None:
            raise failure
        job.run(channel)
    except _ParentGone:
        raise
    except BaseException as error:
        traceback.print_exc()
        channel.send(Failed(faults.classify(error, job) or faults.first_line(error)))
        return False
    _free()
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(Done())
    return True


def _free() -> None:
    """Gives the memory of a job's model back to the system, before the next one loads."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def main(arguments: list[str]) -> None:
    channel = _Channel(Connection(int(arguments[0])))
    with contextlib.suppress(_ParentGone):
        failure = _import_failure(arguments[1])
        channel.phase("import")
        going = True
        while going:
            job = channel.receive()
            channel.phase("wait")
            going = _done(channel, job, failure)
    sys.stdout.flush()
    sys.stderr.flush()
    # All that matters has been sent and closed. vLLM's own processes, which are of this one's session, must not outlive
    # it: the parent would end them, but may be gone by now. It also skips a tear-down in which vLLM spends seconds.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
