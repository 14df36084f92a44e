"""`math`: problems from a file, graded by math-verify in a process of its own that can be killed.

A response can make computer algebra compute for ever (`9^{9^{9^9}}`) or fill the memory, inside C code that no Python
signal handler interrupts. math-verify's own time limits are such handlers, for a main thread only; they are off here.
The one limit is the parent's, who kills the process, and the text travels as JSON: the parent never unpickles what a
process sends that reads model text.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from mismatch_probe.errors import EngineError, EngineMissing, UsageError
from mismatch_probe.rl.tasks import Asked, Problem, Response, task

_MODULE = "mismatch_probe.rl.tasks.mathematics"
_START_SECONDS = 120
_MEMORY = 2 << 30  # of address space; an ordinary response takes less than 0.1 GiB


class Grader:
    """Grades pairs one after another in a process that starts at once and lasts until `close`.

    Attributes:
        killed: Responses that got 0 because their grading took too long, or ended the process.

    Raises:
        EngineMissing: math-verify is not installed.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds that the grading of one response may take."""
        if importlib.util.find_spec("math_verify") is None:
            raise EngineMissing(
                "math-verify is not installed; grading mathematics needs it.",
                'Run: pip install "mismatch-probe[math]".',
            )
        self.killed = 0
        self._timeout = timeout
        self._process = _Process(timeout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def grade(self, pairs: Sequence[tuple[str, str] | None]) -> list[float]:
        """1 for a right response, 0 for a wrong one.

        Args:
            pairs: Answer, as LaTeX or as a plain number, and text of the response, in which the answer is looked for
                (`\\boxed{…}`, else what stands last). None gets 0.

        Raises:
            EngineError: No process can be started.
        """
        return [0.0 if pair is None else self._grade(pair) for pair in pairs]

    def _grade(self, pair: tuple[str, str]) -> float:
        if self._process.has_ended():  # between two batches: no response is to blame
            self._renew()
        found = self._process.ask(pair)
        if found is None:
            self.killed += 1
            self._renew()
            return 0.0
        return found

    def _renew(self) -> None:
        self._process.close()
        self._process = _Process(self._timeout)

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        self._process.close()


class _Process:
    """The parent's side of one process. It stays in the parent's session, so that what ends that session ends it."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._ready = timeout, False
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(timeout)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._ready and self._process.poll() is not None

    def ask(self, pair: tuple[str, str]) -> float | None:
        """The grade; None where it does not come in time, or the process dies over it."""
        self._await_ready()
        try:
            self._connection.send_bytes(json.dumps(pair).encode())
            return float(self._connection.recv_bytes()) if self._connection.poll(self._timeout) else None
        except (EOFError, OSError):
            return None

    def _await_ready(self) -> None:
        """Imports take a second, which is not the first response's."""
        if self._ready:
            return
        try:
            self._ready = self._connection.poll(_START_SECONDS) and bool(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._ready = False
        if not self._ready:
            self.close()
            raise EngineError(
                "The grader of mathematics does not start.", "For the reason run: python -c 'import math_verify'."
            )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


class MathTask:
    """Problems from a file, graded by math-verify in a process that can be killed."""

    def __init__(self, problems: Sequence[Problem], timeout: float) -> None:
        self._problems = problems
        self._grader = Grader(timeout)

    def problems(self) -> list[Problem]:
        return list(self._problems)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float]:
        pairs = [
            (p.answer, r.text) if r.finish_reason == "stop" else None for p, r in zip(problems, responses, strict=True)
        ]
        return self._grader.grade(pairs)

    @property
    def killed(self) -> int:
        return self._grader.killed

    def close(self) -> None:
        self._grader.close()


@task("math")
def _math(problems: Sequence[Problem] | None, asked: Asked) -> MathTask:
    if problems is None:
        raise UsageError("The task math needs a file of problems.", "Give one with --problems.")
    return MathTask(problems, asked.grader_timeout)


def right(answer: str, text: str) -> bool:
    """Whether math-verify finds the answer in the text."""
    from math_verify import parse, verify

    # Bare LaTeX such as \sqrt{2} is only read inside an environment; one around another changes nothing.
    expected = parse(rf"\boxed{{{answer}}}", parsing_timeout=0)
    return bool(verify(expected, parse(text, parsing_timeout=0), timeout_seconds=0))


def main(arguments: list[str]) -> None:
    """`python -m … FD TIMEOUT`: says that it is ready, then answers each pair with 1 or 0."""
    connection, timeout = Connection(int(arguments[0])), float(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard), hard))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    right("1", "1")  # imports, and compiles what it looks for
    connection.send_bytes(b"ready")
    while True:
        try:
            answer, text = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        # The kernel ends a process whose parent was killed and can kill no more; the signal has no handler.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout)
        grade = b"1" if right(answer, text) else b"0"
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send_bytes(grade)
        except OSError:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
