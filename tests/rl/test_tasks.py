"""The arithmetic tasks: problems and rewards against a calculator of its own."""

from __future__ import annotations

import operator
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.errors import UsageError
from mismatch_probe.rl.tasks import Problem, Response, make_task
from mismatch_probe.rl.tasks.arithmetic import ALPHABET, SEPARATORS, ChainTask

FIRST = "1-2-8+3*4+8-0+1*4+5*7*7+3*8-7+8-8="
CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}
sizes = st.tuples(st.integers(1, 40), st.integers(0, 50), st.integers(2, 12))


def solve(text: str) -> list[int]:
    """Exact integers from left to right; the last digit of each, by floor division."""
    head, *steps = re.findall(r"^\d|[-+*]\d", text)
    value, found = int(head), []
    for step in steps:
        value = CALCULATE[step[0]](value, int(step[1]))
        found.append(value - 10 * (value // 10))
    return found


def restated(text: str) -> str:
    steps = re.findall(r"[-+*]\d", text)
    return "".join(f"{step}{result}" for step, result in zip(steps, solve(text), strict=True))


@given(sizes, st.booleans())
def test_answers_are_those_of_exact_arithmetic(size: tuple[int, int, int], free: bool) -> None:
    n, seed, operations = size
    problems = ChainTask(n, seed, operations, free=free).problems()
    assert len(problems) == n
    for problem in problems:
        text = problem.prompt.removeprefix("?")
        assert (problem.prompt != text) == free
        assert re.fullmatch(rf"\d(?:[-+*]\d){{{operations}}}=", text)
        assert problem.answer == str(solve(text)[-1])
        assert set(problem.prompt) <= set(ALPHABET)


@given(sizes)
def test_problems_are_different_ones(size: tuple[int, int, int]) -> None:
    """An interval over problems counts each of them once."""
    n, seed, _ = size
    problems = ChainTask(5 * n, seed, 1).problems()
    assert len({p.prompt for p in problems}) == len({p.problem_id for p in problems}) == 5 * n


def test_all_problems_of_a_length_can_be_had_but_no_more() -> None:
    assert len({p.prompt for p in make_task("chain", n_problems=300, seed=0, operations=1).problems()}) == 300
    with pytest.raises(UsageError, match=r"n_problems \(301\) exceeds the 300 chains"):
        make_task("chain", n_problems=301, seed=0, operations=1)


def test_problems_follow_from_the_seed_and_both_tasks_share_them() -> None:
    chain, again, other = (make_task("chain", n_problems=20, seed=s).problems() for s in (0, 0, 1))
    free = make_task("reasoning", n_problems=20, seed=0).problems()
    assert chain == again
    assert not {p.prompt for p in chain} & {p.prompt for p in other}
    assert [p.prompt for p in free] == [f"?{p.prompt}" for p in chain]
    assert [p.answer for p in free] == [p.answer for p in chain]
    # More problems are the same ones and further ones.
    assert make_task("chain", n_problems=40, seed=0).problems()[:20] == chain
    # The checkpoint that comes with the tool was measured on these.
    assert chain[0].prompt == FIRST


def reward(task: ChainTask, problem: Problem, text: str, finish_reason: str = "stop") -> float:
    (found,) = task.rewards([problem], [Response(text, finish_reason)])
    return found


@given(st.integers(0, 100), st.integers(1, 12))
def test_a_chain_that_is_restated_rightly_is_right(seed: int, operations: int) -> None:
    task = ChainTask(3, seed, operations)
    for problem in task.problems():
        text = restated(problem.prompt)
        assert reward(task, problem, text) == 1.0
        assert reward(task, problem, text, "length") == 0.0
        for wrong in (text[:-1], text + text[-1], text + " ", "", text[:-1] + str((int(text[-1]) + 1) % 10)):
            assert reward(task, problem, wrong) == 0.0
        # One character short, and a separator in its place, does not end where the chain does.
        assert reward(task, problem, text[1:] + ";") == 0.0


@given(st.integers(0, 100), st.text(ALPHABET, max_size=30), st.text(SEPARATORS, max_size=3))
def test_the_last_character_that_is_no_separator_decides_where_the_form_is_free(
    seed: int, anything: str, tail: str
) -> None:
    task = ChainTask(1, seed, 5, free=True)
    (problem,) = task.problems()
    assert reward(task, problem, anything + problem.answer + tail) == 1.0
    assert reward(task, problem, anything + problem.answer + tail, "length") == 0.0
    for wrong in (str((int(problem.answer) + 1) % 10), "=", "?"):
        assert reward(task, problem, anything + wrong + tail) == 0.0


@pytest.mark.parametrize("free", [False, True])
def test_nothing_is_not_right(free: bool) -> None:
    task = ChainTask(1, 0, 4, free=free)
    for text in ("", " ", ";;;;;;;;;;;;"):
        assert reward(task, task.problems()[0], text) == 0.0


def test_rewards_are_in_the_order_of_the_responses() -> None:
    task = ChainTask(4, 0, 3)
    problems = task.problems()
    answers = [Response(restated(p.prompt), "stop") for p in problems]
    assert task.rewards(problems, answers) == [1.0] * 4
    answers[2] = Response("", "stop")
    assert task.rewards(problems, answers) == [1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        task.rewards(problems, answers[:3])


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(UsageError, match="The task 'sums'"):
        make_task("sums", n_problems=1, seed=0)
    with pytest.raises(UsageError, match="needs a file of problems"):
        make_task("math", n_problems=1, seed=0)
