"""The root cause of an engine's log, by excerpts of real logs of vLLM 0.32 (frames and paths cut)."""

from __future__ import annotations

from pathlib import Path

import pytest

from mismatch_probe.engines import faults
from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.engines.root_cause import RootCause, read_since, root_cause
from mismatch_probe.errors import EngineError, ModelError, ProbeError
from mismatch_probe.types import Sampling

_LOGS = Path(__file__).parent / "logs"
_JOB = RolloutJob("vllm", "/models/m", "float16", "cpu", Sampling(8), [], 4, 0, 128)


@pytest.mark.parametrize(
    ("name", "exception", "words", "error"),
    [
        ("truncated-shard", "SafetensorError", "file not fully covered", ModelError),
        ("unknown-architecture", "ValidationError", "model type `nobody`", ModelError),
        ("small-cache", "ValueError", "No available memory for the cache blocks", EngineError),
    ],
)
def test_a_real_log(name: str, exception: str, words: str, error: type[ProbeError]) -> None:
    cause = root_cause((_LOGS / f"{name}.log").read_text(encoding="utf-8"))
    assert cause is not None
    assert cause.name == exception
    assert words in cause.message
    assert type(faults.classify(cause.exception(), _JOB)) is error


def _traceback(*ends: str) -> str:
    return "\n".join(f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n{end}' for end in ends)


@pytest.mark.parametrize(
    ("log", "name", "message"),
    [
        (_traceback("KeyError: 'x'", "ModuleNotFoundError: No module named 'y'"), "ModuleNotFoundError", "No module"),
        (_traceback("a.b.OutOfMemoryError: CUDA out of memory", "BrokenPipeError: [Errno 32]"), "OutOfMemoryError", ""),
        (
            _traceback("AssertionError", "vllm.EngineDeadError: EngineCore encountered an issue"),
            "AssertionError",
            "",
        ),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc", "", "std::bad"),
        ("Fatal Python error: Segmentation fault", "", "Segmentation fault"),
    ],
)
def test_other_ends(log: str, name: str, message: str) -> None:
    cause = root_cause(log)
    assert cause is not None
    assert cause.name == name
    assert message in cause.message


@pytest.mark.parametrize("log", ["", "INFO all is well", _traceback("RuntimeError: x. See root cause above.")])
def test_nothing_is_found(log: str) -> None:
    assert root_cause(log) is None


def test_the_exception_is_of_its_class() -> None:
    assert isinstance(RootCause("ImportError", "x").exception(), ImportError)
    assert type(RootCause("SafetensorError", "x").exception()).__name__ == "SafetensorError"
    assert type(RootCause("exit", "x").exception()).__name__ == "exit"


def test_only_what_was_written_since(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("old\nnew", encoding="utf-8")
    assert read_since(log, 4) == "new"
    assert read_since(tmp_path / "absent.log", 0) == ""
