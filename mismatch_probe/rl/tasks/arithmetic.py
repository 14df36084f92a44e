"""Calculations modulo 10, from left to right.

- `chain`: `7+3*4…=`, to be restated step by step as `+30*40…`: operator, operand, result. Short and of low entropy. A
  response must be as long as the chain and end in the right result; the steps before are not compared, but one that is
  wrong mostly spoils the result.
- `reasoning`: `?7+3…=`, with a free form: separators and repetitions are the model's choice, and the last digit alone
  decides. Longer, and of higher entropy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.rl.tasks import Asked, Problem, Response, task

OPERATORS = "+-*"
SEPARATORS = ",;. "
# Every character of both tasks.
ALPHABET = "0123456789" + OPERATORS + SEPARATORS + "=?"
DRAWN = 128


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
        found = cls(0, 0, 0, free=free)
        found._problems = list(problems)
        return found

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


@task("chain")
def _chain(problems: Sequence[Problem] | None, asked: Asked) -> ChainTask:
    return _made(problems, asked, free=False)


@task("reasoning")
def _reasoning(problems: Sequence[Problem] | None, asked: Asked) -> ChainTask:
    return _made(problems, asked, free=True)


def _made(problems: Sequence[Problem] | None, asked: Asked, *, free: bool) -> ChainTask:
    if problems is not None:
        return ChainTask.given(problems, free=free)
    n_problems = DRAWN if asked.n_problems is None else asked.n_problems
    return ChainTask(n_problems, asked.seed, asked.operations, free=free)
