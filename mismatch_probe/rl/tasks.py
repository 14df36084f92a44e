"""What an RL run trains on: problems with answers that can be checked, and the rewards of responses to them.

- `chain`: a calculation modulo 10, from left to right, `7+3*4…=`, to be restated step by step as `+30*40…`: operator,
  operand, result. Short and of low entropy. A response must be as long as the chain and end in the right result; the
  steps before are not compared, but one that is wrong mostly spoils the result.
- `reasoning`: the same calculations, `?7+3…=`, with a free form: separators and repetitions are the model's choice, and
  the last digit alone decides. Longer, and of higher entropy.
- `math`: problems from a JSONL file of `problem` and `answer`, graded by math-verify (`rl.grader`).

A file can give the problems of the other two, too, as a sanity set does; the reward stays the task's. A response that
used up its budget gets 0 in all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mismatch_probe.errors import PromptError, UsageError

OPERATORS = "+-*"
SEPARATORS = ",;. "
# Every character of both arithmetic tasks.
ALPHABET = "0123456789" + OPERATORS + SEPARATORS + "=?"
DRAWN = 128


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
class Calculation:
    """x₀ and K steps of operator and digit, modulo 10."""

    start: int
    operators: tuple[str, ...]
    digits: tuple[int, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, operations: int) -> Calculation:
        operators = tuple(OPERATORS[i] for i in rng.integers(len(OPERATORS), size=operations))
        return cls(int(rng.integers(10)), operators, tuple(int(d) for d in rng.integers(10, size=operations)))

    @property
    def text(self) -> str:
        steps = "".join(f"{operator}{digit}" for operator, digit in zip(self.operators, self.digits, strict=True))
        return f"{self.start}{steps}="

    def results(self) -> list[int]:
        """The value after each step."""
        value, found = self.start, []
        for operator, digit in zip(self.operators, self.digits, strict=True):
            value = {"+": value + digit, "-": value - digit, "*": value * digit}[operator] % 10
            found.append(value)
        return found


class ChainTask:
    """`chain`, or `reasoning` where `free` is set.

    Raises:
        UsageError: There are not so many different problems of that length.
    """

    killed = 0

    def __init__(self, n_problems: int, seed: int, operations: int, *, free: bool = False) -> None:
        rng = np.random.default_rng((seed, operations, 0xC4A1))
        self._free = free
        possible = 10 * (10 * len(OPERATORS)) ** operations
        if n_problems > possible:
            raise UsageError(
                f"n_problems ({n_problems}) exceeds the {possible} chains of length {operations}.",
                "Lower n_problems, or raise operations.",
            )
        drawn: dict[Calculation, None] = {}  # each once, in their order
        while len(drawn) < n_problems:
            drawn[Calculation.draw(rng, operations)] = None
        self._problems = [
            Problem(f"{'reasoning' if free else 'chain'}-{i:04d}", "?" * free + c.text, str(c.results()[-1]))
            for i, c in enumerate(drawn)
        ]

    @classmethod
    def given(cls, problems: Sequence[Problem], *, free: bool = False) -> ChainTask:
        """With these problems instead of drawn ones.

        Raises:
            PromptError: One of them is no problem of this task.
        """
        form = re.compile(rf"{'[?]' if free else ''}[0-9](?:[{re.escape(OPERATORS)}][0-9])+=")
        for problem in problems:
            if not form.fullmatch(problem.prompt):
                raise PromptError(
                    f"The problem {problem.problem_id} does not belong to the task {'reasoning' if free else 'chain'}.",
                    "Use the task that the file was made with.",
                )
        task = cls(0, 0, 0, free=free)
        task._problems = list(problems)
        return task

    def problems(self) -> list[Problem]:
        return list(self._problems)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float]:
        return [float(self._right(p, r)) for p, r in zip(problems, responses, strict=True)]

    def _right(self, problem: Problem, response: Response) -> bool:
        if response.finish_reason != "stop":
            return False
        steps = sum(character in OPERATORS for character in problem.prompt)
        if not self._free and len(response.text) != 3 * steps:
            return False
        text = response.text.rstrip(SEPARATORS) if self._free else response.text
        return text[-1:] == problem.answer

    def close(self) -> None:
        """Nothing is held."""


class MathTask:
    """Problems from a file, graded by math-verify in a process that can be killed."""

    def __init__(self, problems: Sequence[Problem], timeout: float) -> None:
        from mismatch_probe.rl.grader import Grader

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
        name: `chain`, `reasoning` or `math`.
        n_problems: How many problems; of a file that has more, so many at random. None for all of a file, or 128.
        seed: Which ones.
        operations: Length of a chain that is drawn.
        path: A JSONL file of problems, which `math` needs.
        grader_timeout: Seconds after which a grader that hangs is killed, and the response gets 0.

    Raises:
        UsageError: There is no such task, or `math` has no file.
        PromptError: A line of the file cannot be read, or is no problem of the task.
        EngineMissing: math-verify is not installed.
    """
    if name not in ("chain", "reasoning", "math"):
        raise UsageError(f"The task {name!r} is unknown.", "Known are chain, reasoning and math.")
    free = name == "reasoning"
    if path is None:
        if name == "math":
            raise UsageError("The task math needs a file of problems.", "Give one with --problems.")
        return ChainTask(DRAWN if n_problems is None else n_problems, seed, operations, free=free)
    problems = read_problems(path)
    if n_problems is not None and len(problems) > n_problems:
        kept = np.sort(np.random.default_rng(seed).choice(len(problems), n_problems, replace=False))
        problems = [problems[i] for i in kept]
    return MathTask(problems, grader_timeout) if name == "math" else ChainTask.given(problems, free=free)


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
