"""Grades of many kinds of answer, and a grader that survives what it is given. Parsing is math-verify's; what is ours
is which side is read how, the order, and the process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import EngineError, EngineMissing
from mismatch_probe.rl.tasks import mathematics as module
from mismatch_probe.rl.tasks.mathematics import Grader
from tests.conftest import children, ended

HANGS = r"\boxed{9^{9^{9^{9}}}}"
RIGHT = [
    ("12", "12"),
    ("12", r"First 11, so \boxed{12}."),
    ("12", "We get 11 and then 12"),
    ("12", "The answer is 12."),
    ("-3", r"$-3$"),
    ("1,234", r"\boxed{1234}"),
    ("1234", "The answer is 1,234."),
    ("1/2", r"\boxed{\frac12}"),
    (r"\frac{1}{2}", "so 1/2"),
    (r"\frac{3}{4}", r"\boxed{0.75}"),
    ("-1/2", r"\boxed{-\frac{1}{2}}"),
    ("1/3", "0.333333"),
    ("3.0", "3"),
    (r"50\%", r"\boxed{50\%}"),
    ("(1,2)", r"\boxed{(1,2)}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("1,2", r"\boxed{2, 1}"),
    ("[1,2)", r"\boxed{[1,2)}"),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{(-\infty, 2) \cup (3, \infty)}"),
    ("x=3", r"\boxed{3}"),
    (r"\sqrt{2}", r"\boxed{2^{1/2}}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("2+3i", r"\boxed{3i+2}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
    (r"3\text{ cm}", r"\boxed{3}"),
    (r"90^\circ", r"\boxed{90}"),
    (r"$\frac{1}{2}$", r"\boxed{1/2}"),
    (r"\boxed{4}", "4"),
]
WRONG = [
    ("12", "13"),
    ("12", "nothing here"),
    ("12", ""),
    ("-3", r"\boxed{3}"),
    ("7", r"\boxed{8} but also 7"),
    ("1", r"\boxed{1} or rather \boxed{2}"),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    ("0.333", r"\boxed{1/3}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    (r"\{1,2\}", r"\boxed{\{1,3\}}"),
    ("[1,2)", r"\boxed{[1,2]}"),
    ("x^2+2x+1", r"\boxed{(x-1)^2}"),
    (r"\text{Evelyn}", r"\boxed{\text{Bob}}"),
    ("1", "\x00\ud800 {{{"),
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    """With time enough for a loaded machine: nothing that it is given hangs."""
    found = Grader(60.0)
    yield found
    found.close()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Grader]:
    """Its process follows the script of `planted_grader`."""
    monkeypatch.setattr(module, "_MODULE", "tests.rl.planted_grader")
    monkeypatch.chdir(Path(__file__).parents[2])
    found = Grader(2.0)
    yield found
    found.close()


class TestGrades:
    @pytest.mark.parametrize(("answer", "text"), RIGHT)
    def test_right(self, grader: Grader, answer: str, text: str) -> None:
        assert grader.grade([(answer, text)]) == [1.0]

    @pytest.mark.parametrize(("answer", "text"), WRONG)
    def test_wrong(self, grader: Grader, answer: str, text: str) -> None:
        assert grader.grade([(answer, text)]) == [0.0]

    def test_the_order_is_kept_and_none_gets_nothing(self, grader: Grader) -> None:
        pairs = [RIGHT[0], None, WRONG[0], None, RIGHT[1], WRONG[1], RIGHT[2]]
        assert grader.grade(pairs) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]

    def test_an_empty_batch(self, grader: Grader) -> None:
        assert grader.grade([]) == []

    @settings(max_examples=60, deadline=None)
    @given(st.integers(-9999, 9999), st.integers(1, 99), st.integers(1, 99))
    def test_equal_fractions(self, grader: Grader, top: int, bottom: int, factor: int) -> None:
        same = rf"\boxed{{\frac{{{top * factor}}}{{{bottom * factor}}}}}"
        other = rf"\boxed{{\frac{{{top + 1}}}{{{bottom}}}}}"
        assert grader.grade([(f"{top}/{bottom}", same), (f"{top}/{bottom}", other)]) == [1.0, 0.0]

    def test_nothing_above_was_killed(self, grader: Grader) -> None:
        assert grader.killed == 0


class TestProcess:
    def test_an_expression_that_hangs_costs_itself_only(self) -> None:
        grader = Grader(3.0)
        first = grader.pid
        assert grader.grade([("1", "1"), ("5", HANGS), ("2", "2"), ("3", "2")]) == [1.0, 0.0, 1.0, 0.0]
        assert grader.killed == 1
        assert grader.pid != first
        assert ended(first)
        grader.close()

    @pytest.mark.parametrize("fault", ["hang", "die", "memory"])
    def test_faults(self, planted: Grader, fault: str) -> None:
        assert planted.grade([("a", "a"), ("a", fault), ("a", "b"), ("b", "b"), ("b", fault)]) == [1, 0, 0, 1, 0]
        assert planted.killed == 2
        assert planted.grade([("a", "a")]) == [1.0]
        assert planted.killed == 2

    def test_one_process_serves_all_batches(self, planted: Grader) -> None:
        pid = planted.pid
        assert [planted.grade([(str(pid), "pid")]) for _ in range(3)] == [[1.0]] * 3
        assert planted.pid == pid

    def test_a_process_that_was_killed_between_batches_costs_nobody(self, planted: Grader) -> None:
        planted.grade([("a", "a")])
        os.kill(planted.pid, signal.SIGKILL)
        os.waitid(os.P_PID, planted.pid, os.WEXITED | os.WNOWAIT)
        assert planted.grade([("a", "a"), ("a", "b")]) == [1.0, 0.0]
        assert planted.killed == 0

    def test_close_leaves_no_process(self, planted: Grader) -> None:
        before = children(os.getpid())
        planted.grade([("a", "a")])
        assert planted.pid in before
        planted.close()
        planted.close()
        assert planted.pid not in children(os.getpid())

    def test_close_before_it_is_ready(self) -> None:
        grader = Grader(1.0)
        grader.close()
        assert grader.pid not in children(os.getpid())

    def test_it_ends_with_its_parent(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "mismatch_probe.rl.tasks.mathematics", str(theirs.fileno()), "1"]
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        connection = module.Connection(ours.detach())
        assert connection.recv_bytes() == b"ready"
        connection.send_bytes(b'["5", "%s"]' % HANGS.replace("\\", "\\\\").encode())
        connection.close()
        assert process.wait(60) == -signal.SIGALRM

    def test_a_process_that_cannot_start_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MODULE", "mismatch_probe.rl.no_such_module")
        grader = Grader(1.0)
        with pytest.raises(EngineError, match="does not start"):
            grader.grade([("a", "a")])

    def test_a_missing_package_is_named_with_its_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(EngineMissing) as error:
            Grader(1.0)
        assert error.value.fix == 'Run: pip install "mismatch-probe[math]".'
