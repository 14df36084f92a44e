"""The task `lines`: a property of a text, checked against a second way to check it."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.rl.tasks import Problem, Response, make_task
from mismatch_probe.rl.tasks.lines import LEAST_CHARACTERS, WORDS, LinesTask, Property

words = st.sampled_from([*WORDS, "selfish", "Return", "x1", "name2", "_", "="])
texts = st.lists(st.lists(words, min_size=1, max_size=12).map(" ".join), min_size=1, max_size=5).map("\n".join)
properties = st.builds(Property, st.integers(1, 5), st.sampled_from(WORDS), st.sampled_from(WORDS))


def has_word(text: str, word: str) -> bool:
    """Letter by letter, without a regular expression."""
    letters = string.ascii_letters + "_"
    split = "".join(c if c in letters else " " for c in text).split()
    return word in split


@given(texts, properties)
def test_a_text_has_the_property_if_each_part_of_it_holds(text: str, asked: Property) -> None:
    lines, seen = text.split("\n"), set()
    wanted = len(lines) == asked.n_lines and has_word(text, asked.used) and not has_word(text, asked.avoided)
    for line in lines:
        wanted = wanted and line not in seen and len(line) >= LEAST_CHARACTERS
        seen.add(line)
    assert asked.held_by(text) == wanted


GOOD = "\n".join(f"self.{name} = value of {name}" for name in ("first_part", "second_part", "third_part"))


@pytest.mark.parametrize(
    ("text", "reason", "reward"),
    [
        (GOOD, "stop", 1.0),
        (GOOD, "length", 0.0),
        (GOOD + "\n", "stop", 0.0),
        (GOOD.replace("self", "it"), "stop", 0.0),
        (GOOD.replace("value", "return"), "stop", 0.0),
        (GOOD.replace("second", "first"), "stop", 0.0),
        (GOOD.replace("third_part", "x"), "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_a_response_is_right_where_it_ends_and_has_the_property(text: str, reason: str, reward: float) -> None:
    problem = Problem("p", "3 +self -return\n", "")
    assert LinesTask([problem]).rewards([problem], [Response(text, reason)]) == [reward]


@given(st.integers(0, 1000))
def test_prompts_say_what_is_asked(seed: int) -> None:
    for problem in make_task("lines", n_problems=4, seed=seed).problems():
        asked = Property.of(problem.prompt)
        assert asked is not None
        assert asked.prompt == problem.prompt
        assert asked.used != asked.avoided


def test_problems_are_different_ones_and_there_are_only_so_many() -> None:
    assert len({problem.prompt for problem in make_task("lines", n_problems=660, seed=1).problems()}) == 660
    with pytest.raises(UsageError, match=r"n_problems \(661\) exceeds the 660"):
        make_task("lines", n_problems=661, seed=1)


def test_problems_follow_from_the_seed() -> None:
    first, again, other = (make_task("lines", n_problems=8, seed=seed).problems() for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("prompt", ["3 +self -return", "0 +self -return\n", "3 +self\n", "lines"])
def test_a_prompt_of_another_form_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="does not belong to the task lines"):
        LinesTask([Problem("p", prompt, "")])
