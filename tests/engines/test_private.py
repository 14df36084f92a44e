"""Every private part of vLLM and transformers that is used is listed, is where it was read, and is really used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.engines import private
from mismatch_probe.engines.private import PARTS, READ_IN, Part, moved

PACKAGE = Path(mismatch_probe.__file__).parent
installed = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@installed
def test_nothing_has_moved() -> None:
    assert list(private.report()) == []


@installed
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.entrypoints.llm", "LLM.nothing"),
        ("vllm.entrypoints.llm", "LLM.sleep(depth)"),
        ("vllm.entrypoints.nowhere", "LLM"),
        ("vllm.envs", '"VLLM_NOTHING"'),
        ("vllm.config.model", "_TABLE"),
        ("vllm.v1.engine.llm_engine", "LLMEngine.step.step"),
    ],
)
def test_what_is_gone_is_noticed(module: str, name: str) -> None:
    assert moved(Part(module, name, "engines.vllm.engine", "a test"))


def test_a_line_says_who_needs_what_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "PARTS", (Part("vllm.config.model", "_TABLE", "engines.vllm.unsupported", "a test"),))
    monkeypatch.setattr(private, "READ_IN", {"vllm": "0.1"})
    versions, line = private.report()
    assert "0.1 was read" in versions
    assert "vllm.config.model has no _TABLE" in line
    assert "mismatch_probe.engines.vllm.unsupported" in line


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.module}.{part.name}")
def test_a_listed_part_is_used(part: Part) -> None:
    text = (PACKAGE / (part.used_by.replace(".", "/") + ".py")).read_text()
    names = part.name.strip('"').rstrip(")").replace("(", ".").split(".")
    assert names[-1] in text


def _imports() -> Iterator[tuple[str, str, str]]:
    """Module of this package, module that it imports from, and name."""
    for file in PACKAGE.rglob("*.py"):
        own = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in READ_IN:
                yield from ((own, str(node.module), alias.name) for alias in node.names)


def test_imports_from_within_are_listed() -> None:
    """What the packages export at their top is public; `vllm.config`, `vllm.distributed` and their like re-export."""
    listed = {(part.used_by, part.name.partition(".")[0]) for part in PARTS}
    modules = {(part.used_by, part.module.rpartition(".")[2]) for part in PARTS}
    inner = {found for found in _imports() if "." in found[1]}
    assert inner
    public = {("engines.environment", "current_platform")}
    assert {(own, name) for own, _, name in inner} <= listed | modules | public


def test_only_its_own_folder_knows_vllm() -> None:
    knowing = {own for own, module, _ in _imports() if module.startswith("vllm")}
    assert all(own.startswith("engines.vllm.") or own == "engines.environment" for own in knowing)
