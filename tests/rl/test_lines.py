"""The task `lines`: a property of a text, checked against a second way to check it."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.probes.progress import Progress
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.run import BUNDLED, resolve_model
from mismatch_probe.rl.tasks import Problem, Response, make_task
from mismatch_probe.rl.tasks.lines import LEAST_CHARACTERS, MARGIN, WORDS, LinesTask, Property

words = st.sampled_from([*WORDS[:6], "selfish", "Return", "x1", "name2", "_", "=", "of_it"])
texts = st.lists(st.lists(words, min_size=3, max_size=12).map(" ".join), min_size=1, max_size=7).map("\n".join)
pairs = st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS))
properties = st.builds(Property, st.integers(1, 5), pairs)


def has_word(text: str, word: str) -> bool:
    """Letter by letter, without a regular expression."""
    letters = string.ascii_letters + "_"
    split = "".join(c if c in letters else " " for c in text).split()
    return word in split


@given(texts, properties)
def test_a_text_has_the_property_if_each_part_of_it_holds(text: str, asked: Property) -> None:
    lines, seen = text.split("\n"), set()
    wanted = -MARGIN <= len(lines) - asked.n_lines <= MARGIN and not any(has_word(text, word) for word in asked.avoided)
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
        (GOOD.split("\n")[0], "stop", 0.0),
        (GOOD.replace("value", "return"), "stop", 0.0),
        (GOOD.replace("value", "key"), "stop", 0.0),
        (GOOD.replace("value", "key2return"), "stop", 0.0),
        (GOOD.replace("value", "keyword"), "stop", 1.0),
        ("\n".join(f"line {i}, long enough" for i in range(7)), "stop", 1.0),
        ("\n".join(f"line {i}, long enough" for i in range(8)), "stop", 0.0),
        (GOOD.replace("second", "first"), "stop", 0.0),
        (GOOD.replace("value of third_part", "x"), "stop", 1.0),
        (GOOD.replace("third_part = value of third_part", "x = x"), "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_a_response_is_right_where_it_ends_and_has_the_property(text: str, reason: str, reward: float) -> None:
    problem = Problem("p", "5 -key -return\n" if text.startswith("line") else "4 -key -return\n", "")
    assert LinesTask([problem]).rewards([problem], [Response(text, reason)]) == [reward]


@given(st.integers(0, 1000))
def test_prompts_say_what_is_asked(seed: int) -> None:
    for problem in make_task("lines", n_problems=4, seed=seed).problems():
        asked = Property.of(problem.prompt)
        assert asked is not None
        assert asked.prompt == problem.prompt
        assert asked.avoided[0] < asked.avoided[1]


def test_problems_are_different_ones_and_there_are_only_so_many() -> None:
    assert len({problem.prompt for problem in make_task("lines", n_problems=None, seed=1).problems()}) == 15
    with pytest.raises(UsageError, match=r"n_problems \(16\) exceeds the 15"):
        make_task("lines", n_problems=16, seed=1)


def test_problems_follow_from_the_seed() -> None:
    first, again, other = (make_task("lines", n_problems=8, seed=seed).problems() for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("prompt", ["3 -key -return", "0 -key -return\n", "3 -key\n", "lines"])
def test_a_prompt_of_another_form_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="does not belong to the task lines"):
        LinesTask([Problem("p", prompt, "")])


@pytest.mark.parametrize(("model", "task"), [BUNDLED, BUNDLED[::-1]])
def test_a_model_that_comes_with_the_tool_is_not_given_the_task_of_another(model: str, task: str) -> None:
    with pytest.raises(UsageError, match=f"The model {model} does not know the task {task}"):
        resolve_model([RlConfig(model=model, task=task)], Progress())
    resolve_model([RlConfig(model=model, task=model)], Progress())
