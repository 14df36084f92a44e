"""Text of which a property can be checked exactly and that many texts have: `lines`.

`12 -return -self` asks for 12 lines, give or take 2, all different and of at least 16 characters, none of which has one
of the two words. Nothing else is asked of them, so that a policy which always succeeds may still say nearly anything:
the entropy of a token stays, and with it the mismatch, unlike in a calculation with one right answer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.rl.tasks import Asked, Problem, Response, task

LEAST_CHARACTERS = 16
FEWEST_LINES, MOST_LINES = 10, 14
# Lines by which a text may have too many or too few.
MARGIN = 2
# Words that a model may be asked to avoid, all frequent in Python.
WORDS = (
    *("and", "args", "class", "data", "def", "else", "file", "for", "if", "import", "in", "is", "key", "line", "name"),
    *("not", "object", "of", "path", "raise", "return", "self", "the", "value"),
)
# Those that are asked for: the most frequent ones, so that a text seldom is right by chance, and few, so that what is
# learned at one problem serves at the others.
ASKED = ("if", "return", "self")
_WORD = re.compile(r"[A-Za-z_]+")
_PROMPT = re.compile(r"([1-9][0-9]*) -([a-z]+) -([a-z]+)\n")


def words_of(text: str) -> set[str]:
    """Its words, as the task tells them apart."""
    return set(_WORD.findall(text))


@dataclass(frozen=True)
class Property:
    """What a text shall have: about so many lines, and none of the words."""

    n_lines: int
    avoided: tuple[str, str]

    @property
    def prompt(self) -> str:
        return f"{self.n_lines} -{self.avoided[0]} -{self.avoided[1]}\n"

    @classmethod
    def of(cls, prompt: str) -> Property | None:
        """What a prompt asks for; None where it is none of this task."""
        found = _PROMPT.fullmatch(prompt)
        return cls(int(found[1]), (found[2], found[3])) if found else None

    def held_by(self, text: str) -> bool:
        """Whether a text has it."""
        lines = text.split("\n")
        return (
            abs(len(lines) - self.n_lines) <= MARGIN
            and len(set(lines)) == len(lines)
            and all(len(line) >= LEAST_CHARACTERS for line in lines)
            and not words_of(text) & set(self.avoided)
        )


class LinesTask:
    """`lines`.

    Args:
        problems: Each a prompt of this task; what its answer is does not matter.

    Raises:
        PromptError: One of them is no problem of this task.
    """

    killed = 0

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        for problem in problems:
            if Property.of(problem.prompt) is None:
                raise PromptError(
                    f"The problem {problem.problem_id} does not belong to the task lines.",
                    "Write prompts like '12 -return -self' with a line feed at their end.",
                )

    @classmethod
    def drawn(cls, n_problems: int | None, seed: int) -> LinesTask:
        """With so many different problems, or all.

        Raises:
            UsageError: There are not so many.
        """
        sizes = range(FEWEST_LINES, MOST_LINES + 1)
        every = [Property(n, pair) for n in sizes for pair in itertools.combinations(ASKED, 2)]
        if n_problems is not None and n_problems > len(every):
            raise UsageError(f"n_problems ({n_problems}) exceeds the {len(every)} of the task.", "Lower n_problems.")
        chosen = np.random.default_rng((seed, 0x11E5)).permutation(len(every))[:n_problems]
        return cls([Problem(f"lines-{i:04d}", every[at].prompt, "") for i, at in enumerate(chosen)])

    def problems(self) -> list[Problem]:
        return list(self._problems)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[float]:
        return [float(_right(p.prompt, r)) for p, r in zip(problems, responses, strict=True)]

    def close(self) -> None:
        """Nothing is held."""


def _right(prompt: str, response: Response) -> bool:
    asked = Property.of(prompt)
    return asked is not None and response.finish_reason == "stop" and asked.held_by(response.text)


@task("lines")
def _lines(problems: Sequence[Problem] | None, asked: Asked) -> LinesTask:
    if problems is not None:
        return LinesTask(problems)
    return LinesTask.drawn(asked.n_problems, asked.seed)
