"""Problems from a file, for every task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import PromptError, UsageError
from mismatch_probe.rl.tasks import Problem, Response, make_task, read_problems
from mismatch_probe.rl.tasks.arithmetic import Calculation, ChainTask


def write(path: Path, problems: Sequence[Problem], **more: Any) -> str:
    rows = [{"id": p.problem_id, "problem": p.prompt, "answer": p.answer, **more} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def worked(prompt: str) -> str:
    """The right continuation of a chain, step by step."""
    body = prompt.removesuffix("=")
    calculation = Calculation(int(body[0]), tuple(body[1::2]), tuple(int(d) for d in body[2::2]))
    steps = zip(calculation.operators, calculation.digits, calculation.results(), strict=True)
    return "".join(f"{operator}{digit}{result}" for operator, digit, result in steps)


class TestArithmetic:
    @pytest.mark.parametrize("name", ["chain", "reasoning"])
    def test_a_file_stands_for_drawn_problems(self, tmp_path: Path, name: str) -> None:
        drawn = make_task(name, n_problems=20, seed=3, operations=5)
        path = write(tmp_path / "set.jsonl", drawn.problems()[4:9], accuracy=0.5, n_samples=40)
        given = make_task(name, n_problems=None, seed=0, operations=16, path=path)
        assert given.problems() == drawn.problems()[4:9]
        assert given.killed == 0

    def test_the_reward_rule_is_that_of_drawn_problems_whatever_their_length(self, tmp_path: Path) -> None:
        problems = [ChainTask(1, seed, operations).problems()[0] for seed, operations in ((0, 3), (1, 7))]
        problems = [Problem(f"p{i}", p.prompt, p.answer) for i, p in enumerate(problems)]
        task = make_task("chain", n_problems=None, seed=0, path=write(tmp_path / "set.jsonl", problems))
        right = [worked(p.prompt) for p in problems]
        assert task.rewards(problems, [Response(text, "stop") for text in right]) == [1.0, 1.0]
        assert task.rewards(problems, [Response(text, "length") for text in right]) == [0.0, 0.0]
        assert task.rewards(problems, [Response(text[3:], "stop") for text in right]) == [0.0, 0.0]
        assert task.rewards(problems[::-1], [Response(text, "stop") for text in right]) == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("name", "prompt"),
        [
            ("chain", "What is 1+1?"),
            ("chain", "?7+3="),
            ("chain", "7+3"),
            ("chain", "7="),
            ("chain", "7+3=1"),
            ("chain", "٧+3="),
            ("reasoning", "7+3="),
        ],
    )
    def test_a_problem_of_another_task_is_refused(self, tmp_path: Path, name: str, prompt: str) -> None:
        path = write(tmp_path / "set.jsonl", [Problem("odd-one", prompt, "0")])
        with pytest.raises(PromptError, match=f"odd-one does not belong to the task {name}"):
            make_task(name, n_problems=None, seed=0, path=path)

    def test_without_a_number_128_are_drawn(self) -> None:
        assert len(make_task("chain", n_problems=None, seed=0).problems()) == 128


class TestFiles:
    def test_some_of_a_longer_file_in_its_order(self, tmp_path: Path) -> None:
        drawn = ChainTask(50, 0, 4).problems()
        path = write(tmp_path / "set.jsonl", drawn)
        picks = [make_task("chain", n_problems=10, seed=seed, path=path).problems() for seed in (0, 0, 1)]
        assert picks[0] == picks[1] != picks[2]
        assert picks[0] == [p for p in drawn if p in picks[0]]
        assert len(picks[0]) == 10
        assert make_task("chain", n_problems=51, seed=0, path=path).problems() == drawn

    def test_an_id_that_comes_twice_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "set.jsonl", [Problem("a", "1+1=", "2"), Problem("a", "1+2=", "3")])
        with pytest.raises(PromptError, match="have the id a"):
            read_problems(path)

    def test_math_needs_a_file(self) -> None:
        with pytest.raises(UsageError, match="needs a file"):
            make_task("math", n_problems=None, seed=0)

    def test_math_grades_what_has_ended(self, tmp_path: Path) -> None:
        problems = [Problem("half", "One half?", r"\frac{1}{2}"), Problem("two", "Two?", "2")]
        task = make_task("math", n_problems=None, seed=0, path=write(tmp_path / "m.jsonl", problems), grader_timeout=60)
        answers = [Response(r"\boxed{0.5}", "stop"), Response("2", "length")]
        assert task.rewards(problems, answers) == [1.0, 0.0]
        assert task.rewards(problems, [Response("3", "stop"), Response("2", "stop")]) == [0.0, 1.0]
        assert task.killed == 0
        task.close()


def test_line_separators_inside_a_text_are_no_ends_of_lines(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\u0085d"
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": text, "answer": "1"}, ensure_ascii=False) + "\r\n")
    assert [problem.prompt for problem in read_problems(tmp_path / "p.jsonl")] == [text]
