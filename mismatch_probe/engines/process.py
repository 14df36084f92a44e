"""The parent's side of an engine process.

An engine lives in a process, in a session of its own: a Ctrl-C in the terminal reaches the parent alone, and killing
the session leaves nothing of the engine behind. A process has one engine at a time, and ends with the first job that
fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from mismatch_probe.engines import faults
from mismatch_probe.engines.base import Job
from mismatch_probe.engines.events import Done, Event, Failed, Listener
from mismatch_probe.engines.root_cause import read_since, root_cause
from mismatch_probe.errors import EngineError, ProbeError

_GRACE_SECONDS = 20


class UnexpectedEngineError(EngineError):
    """The engine failed in a way that is not known to be the user's to fix."""


class EngineProcess:
    """One worker process. It starts to import at once and waits for its first job.

    Args:
        kind: The engine whose packages it imports ahead.
        environment: What is added to this process's.
        log: File for its output.
    """

    def __init__(self, kind: str, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        command = [sys.executable, "-m", "mismatch_probe.engines.worker", str(theirs.fileno()), kind]
        with theirs, log.open("ab") as output:
            self._log_offset = output.tell()  # where the present job's output begins, the first one's with the imports
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, job: Job, on_event: Listener, *, last: bool = True) -> None:
        """Gives the process a job and hands on its events until it is done.

        Args:
            job: What to do.
            on_event: Told about every event.
            last: Whether the process ends with it; otherwise it waits for another job. After an error it has ended.

        Raises:
            ProbeError: What went wrong, as the user's error.
            UnexpectedEngineError: The engine failed in an unknown way.
        """
        goes_on = False
        try:
            for event in self._events(job):
                if isinstance(event, Failed):
                    raise event.error if isinstance(event.error, ProbeError) else self._failure(event.error, job)
                on_event(event)
            if not last:
                self._log_offset = self._log.stat().st_size
                goes_on = True
        finally:
            if not goes_on:
                self.close()

    def _events(self, job: Job) -> Iterator[Event]:
        """What the process says, up to `Done`."""
        try:
            self._connection.send(job)
            while not isinstance(event := self._connection.recv(), Done):
                yield event
        except (EOFError, OSError) as error:
            raise self._death(job) from error

    def close(self) -> None:
        """Ends the process and all its children; a second call does nothing."""
        if self._connection.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _failure(self, message: str, job: Job) -> ProbeError:
        """What went wrong by the log of this very process, which knows more than the message where vLLM's own processes
        failed.
        """
        cause = root_cause(read_since(self._log, self._log_offset))
        if cause is not None:
            known = faults.classify(cause.exception(), job)
            if known is not None:
                return known
            message = faults.first_line(cause.exception())
        error = faults.unexpected(message, job, str(self._log))
        return UnexpectedEngineError(error.what, error.fix)

    def _death(self, job: Job) -> ProbeError:
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGKILL:
            return EngineError(
                f"{job.subject} was killed (signal 9). The usual cause is that the machine ran out of memory.",
                "Free memory or use smaller batches, then continue with --resume.",
            )
        cause = f"signal {-code}" if code < 0 else f"exit status {code}"
        return self._failure(f"its process ended with {cause}.", job)
