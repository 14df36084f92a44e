"""Schemas and generated pages are those of the code, and findings and words know the same codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.report.words import all_words
from mismatch_probe.results.base import Document
from tools import pages, schemas

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


def test_every_code_of_a_finding_has_words() -> None:
    used = {code: path for path in PACKAGE.rglob("*.py") for code in _codes(ast.parse(path.read_text("utf-8")))}
    assert {code: str(path) for code, path in used.items() if code not in all_words()} == {}


def test_every_code_with_words_is_made_somewhere() -> None:
    trees = [ast.parse(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py") if PACKAGE / "report" not in p.parents]
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


def _codes(tree: ast.Module) -> Iterator[str]:
    """Codes that stand in a call of `Finding`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Finding":
            given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
            yield from (one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str))
