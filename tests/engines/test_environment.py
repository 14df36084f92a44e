"""What works here: the check runs in a child, so whatever befalls the child is an answer too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mismatch_probe.engines import environment
from mismatch_probe.errors import EngineMissing
from mismatch_probe.types import DTYPES

FOUND = {"hf": "", "vllm": "", "platform": "cpu", "dtypes": ["bfloat16", "float32"], "torch": {"devices": ["a GPU"]}}


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the program of the child, on a machine that vLLM's build fits."""
    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", lambda requested: "cpu")
    return lambda program: monkeypatch.setattr(environment, "_PROBE", program)


def says(found: dict[str, Any]) -> str:
    return f"import json; print('a library greets'); print(json.dumps({found!r}))"


def test_usable(child: Callable[[str], None]) -> None:
    child(says(FOUND))
    found = environment.inspect()
    assert (found["device"], found["machine"]["gpus"]) == ("cpu", ["a GPU"])
    assert found["engines"]["hf"] == {"usable": True, "why": "", "dtypes": dict.fromkeys(DTYPES, "")}
    assert [bool(why) for why in found["engines"]["vllm"]["dtypes"].values()] == [False, True, False]


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "Run: pip install"),
        ("OSError: libtorchaudio.so: undefined symbol\nmore", "Uninstall torchvision"),
    ],
)
def test_vllm_that_does_not_import(child: Callable[[str], None], failure: str, advice: str) -> None:
    child(says({**FOUND, "vllm": failure}))
    engines = environment.inspect()["engines"]
    assert engines["hf"]["usable"]
    assert not engines["vllm"]["usable"]
    assert engines["vllm"]["why"].startswith(f"{failure.splitlines()[0]} {advice}")
    assert all(engines["vllm"]["dtypes"].values())


def test_vllm_that_imports_but_is_built_for_another_machine(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    child(says(FOUND))

    def refuse(requested: str) -> None:
        raise EngineMissing("The CUDA build is installed, but there is no GPU.", "Install the other one.")

    monkeypatch.setattr("mismatch_probe.engines.vllm.choose_device", refuse)
    engines = environment.inspect()["engines"]
    assert [engines[name]["usable"] for name in ("vllm", "hf")] == [False, True]
    assert engines["vllm"]["why"] == "The CUDA build is installed, but there is no GPU. Install the other one."


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("import sys; sys.exit('Illegal instruction')", "Illegal instruction "),
        ("import os; os._exit(1)", "the check printed nothing "),
    ],
)
def test_a_check_that_dies(child: Callable[[str], None], program: str, sentence: str) -> None:
    child(program)
    engines = environment.inspect()["engines"]
    assert all(not engine["usable"] and engine["why"].startswith(sentence) for engine in engines.values())


def test_a_check_that_hangs(child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    child("import signal; signal.pause()")
    monkeypatch.setattr(environment, "_TIMEOUT_SECONDS", 0.01)
    for engine in environment.inspect()["engines"].values():
        assert not engine["usable"]
        assert engine["why"] == (
            "The engine check did not finish within 120 s. Try again when the machine is less busy."
        )
