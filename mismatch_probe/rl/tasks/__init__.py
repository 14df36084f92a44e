"""What an RL run trains on: problems with answers that can be checked, and the rewards of responses to them.

A module of this package registers tasks and is found by itself. A JSONL file can give the problems of every task. A
response that used up its budget gets 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.registered import Registry


@dataclass(frozen=True)
class Problem:
    """A problem with its answer; `prompt` is the text that the model is given."""

    problem_id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Response:
    """A response without special tokens; `finish_reason` is `stop` where an end token came, else `length`."""

    text: str
    finish_reason: str


class Task(Protocol):
    """Problems and their rewards."""

    @property
    def killed(self) -> int:
        """Responses so far that got 0 because their grader had to be killed."""

    def problems(self) -> list[Problem]:
        """All of them, in a fixed order."""

    def rewards(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float]:
        """A reward for each response to the problem beside it."""

    def close(self) -> None:
        """Frees what grading needs."""


@dataclass(frozen=True)
class Asked:
    """How a task is asked for.

    Attributes:
        n_problems: How many problems to draw; None for the task's own number.
        seed: Which ones.
        operations: Length of a calculation that is drawn.
        grader_timeout: Seconds after which a grader that hangs is killed, and the response gets 0.
    """

    n_problems: int | None
    seed: int
    operations: int
    grader_timeout: float


Maker = Callable[[Sequence[Problem] | None, Asked], Task]
_REGISTRY = Registry[Maker](__name__, "task")


def task(name: str) -> Callable[[Maker], Maker]:
    """Registers what makes a task: from the problems of a file, or from None where it is to draw its own.

    Raises:
        ValueError: The name is taken.
    """

    def register(maker: Maker) -> Maker:
        _REGISTRY.add(name, maker)
        return maker

    return register


def tasks() -> dict[str, Maker]:
    """Every registered task, by name."""
    return _REGISTRY.sorted()


def make_task(
    name: str,
    *,
    n_problems: int | None,
    seed: int,
    operations: int = 16,
    path: str | None = None,
    grader_timeout: float = 5.0,
) -> Task:
    """The task of that name.

    Args:
        name: A registered name.
        n_problems: How many problems; of a file that has more, so many at random. None for all of a file, or as many as
            the task draws by itself.
        seed: Which ones.
        operations: Length of a calculation that is drawn.
        path: A JSONL file of problems.
        grader_timeout: Seconds after which a grader that hangs is killed, and the response gets 0.

    Raises:
        UsageError: There is no such task, or it needs a file of problems.
        PromptError: A line of the file cannot be read, or is no problem of the task.
        EngineMissing: What grades the task is not installed.
    """
    known = tasks()
    if name not in known:
        raise UsageError(f"The task {name!r} is unknown.", f"Known are {', '.join(known)}.")
    problems = None if path is None else read_problems(path)
    if problems is not None and n_problems is not None and len(problems) > n_problems:
        import numpy as np

        kept = np.sort(np.random.default_rng(seed).choice(len(problems), n_problems, replace=False))
        problems = [problems[i] for i in kept]
    return known[name](problems, Asked(n_problems, seed, operations, grader_timeout))


def read_problems(path: str | Path) -> list[Problem]:
    """Reads a JSONL file of `problem`, `answer` and perhaps `id`.

    Raises:
        PromptError: The file cannot be read, is empty, one of its lines is wrong, or an id comes twice.
    """
    try:
        # Not splitlines(): it splits at characters that JSON leaves as they are.
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(f"The problem file {path} cannot be read ({reason}).", "Check its path.") from None
    found = [_problem(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise PromptError(f"The problem file {path} has no problems.", "Write one JSON object per line.")
    seen: set[str] = set()
    for problem in found:
        if problem.problem_id in seen:
            raise PromptError(
                f"Two problems of {path} have the id {problem.problem_id}.", "Give each problem its own id."
            )
        seen.add(problem.problem_id)
    return found


def _problem(path: str | Path, number: int, line: str) -> Problem:
    try:
        row: Any = json.loads(line)
        problem, answer = row["problem"], row["answer"]
    except (ValueError, KeyError, TypeError):
        problem = answer = None
    if not isinstance(problem, str) or not isinstance(answer, str | int | float):
        raise PromptError(
            f"Line {number} of {path} is not a problem with an answer.", 'Write {"problem": "…", "answer": "…"}.'
        )
    return Problem(str(row.get("id", f"line-{number}")), problem, str(answer))
