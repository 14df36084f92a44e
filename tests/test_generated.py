"""Schemas and generated pages are those of the code, and findings and words know the same codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.report.words import all_words
from mismatch_probe.results.base import Document
from tools import keywords, pages, schemas

PACKAGE = Path(mismatch_probe.__file__).parent
DOCUMENTS = schemas.documents()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_schema_is_what_the_models_say(name: str) -> None:
    found = (schemas.FOLDER / name).read_text(encoding="utf-8")
    assert found == schemas.text(DOCUMENTS[name]), "`make schema` writes it"


def test_no_schema_is_left_over() -> None:
    assert sorted(path.name for path in schemas.FOLDER.iterdir()) == sorted(DOCUMENTS)


@pytest.mark.parametrize("kind", DOCUMENTS.values(), ids=list(DOCUMENTS))
def test_every_field_is_described(kind: type[Document]) -> None:
    found = schemas.schema(kind)
    parts = found.get("$defs", {})
    missing = [
        f"{part}.{name}"
        for part, model in {kind.__name__: found, **parts}.items()
        for name, field in model.get("properties", {}).items()
        # A field that says what its type says is given the type's description.
        if not (field.get("description") or parts.get(field.get("$ref", "").rpartition("/")[2], {}).get("description"))
    ]
    assert missing == []


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (pages.FOLDER / name).read_text(encoding="utf-8") == pages.PAGES[name](), "`make docs` writes it"


def test_keywords_are_those_of_the_settings() -> None:
    assert keywords.FILE.read_text(encoding="utf-8") == keywords.keywords_module(), "`make docs` writes it"


def test_every_code_of_a_finding_has_words() -> None:
    used = {code: path for path, code, _ in _made()}
    assert {code: str(path) for code, path in used.items() if code not in all_words()} == {}


def test_values_of_a_finding_are_those_of_its_words() -> None:
    known = {code: set(words.values) for code, words in all_words().items()}
    assert {code: names ^ known[code] for _, code, names in _made() if names is not None and names != known[code]} == {}


def test_every_code_with_words_is_made_somewhere() -> None:
    trees = [tree for path, tree in _trees().items() if PACKAGE / "report" not in path.parents]
    texts = re.compile("|".join({_pattern(node) for tree in trees for node in ast.walk(tree)} - {""}))
    assert [code for code in all_words() if not texts.fullmatch(code)] == []


def _pattern(node: ast.AST) -> str:
    """What a string that can be a code matches: what is put into an f-string stands for any text."""
    match node:
        case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", text):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), ast.FormattedValue()]) if re.fullmatch(
            r"([a-z0-9]+-)+", text
        ):
            return f"{text}[a-z0-9-]+"
    return ""


@cache
def _trees() -> dict[Path, ast.Module]:
    """Every module of the package."""
    return {path: ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}


def _made() -> Iterator[tuple[Path, str, set[str] | None]]:
    """Findings that are made with a code that can be read off: file, code, and names of its values if they can be."""
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name == "found" and isinstance(node, ast.Call) and len(node.args) > 1:  # `probes.preflight.found`
                named = {keyword.arg for keyword in node.keywords}
                if isinstance(node.args[0], ast.Constant):
                    yield path, node.args[0].value, None if None in named else {str(one) for one in named}
            if name == "Finding" and isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                code, values = given.get("code", node.args[0] if node.args else None), given.get("values")
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    yield path, code.value, _names(values)


def _names(values: ast.expr | None) -> set[str] | None:
    """Keys of a literal."""
    keys = values.keys if isinstance(values, ast.Dict) else []
    texts = {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return texts if values is None or (keys and len(texts) == len(keys)) else None
