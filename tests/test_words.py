"""One word for one thing: words that were given up stay out of what a person reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RETIRED = {
    r"knobs?": "setting",
    r"nulls?": "self-noise, or no value",
    r"not judged": "inconclusive",
    r"mend(s|ed|ing)?": "fix",
    r"lack(s|ed|ing)?": "has no, or is missing",
    r"laws?": "sampling distribution",
    r"anchors?": "reference",
    r"cells?": "pair, run or arm",
    r"two-sided fix(es)?": "a setting on both sides",
    r"(that|this|which|it) is no (?!longer|more\b)": "a plain negation: is not",
    r"cannot be: ": "the subject first: --x exceeds y",
}
"""Pattern of each retired word, and what to write instead."""
ALLOWED = {
    "null": [
        "JSON null",
        "is null",
        "are null",
        "be null",
        "then null",
        "null throughout",
        "null where",
        "`null`",
        "null value",
        "-null",
    ],
    "law": ["growth law", "power law"],
}
PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Literals of several words, docstrings of public functions and the text of f-strings, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def found(text: str) -> list[str]:
    for word, contexts in ALLOWED.items():
        for context in contexts:
            text = re.sub(re.escape(context), context.replace(word, "…"), text, flags=re.IGNORECASE)
    return [
        f"{match[0]!r}: say {say}" for word, say in RETIRED.items() if (match := re.search(rf"\b{word}", text, re.I))
    ]


# A metric's own statistics speak of null hypotheses and growth laws, a reader of files of nulls, a table of cells.
FIELD_TERMS = {"metrics": ("law", "null"), "ingest": ("null",), "report": ("cell", "anchor"), "render": ("cell",)}
FIELD_TERMS |= {"figures": ("cell",), "formats": ("null",), "metric_log": ("null",)}


@pytest.mark.parametrize("package", sorted({path.parent for path in (ROOT / "mismatch_probe").rglob("*.py")}), ids=str)
def test_strings_of_the_package(package: Path) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in sorted(package.glob("*.py"))
        for line, text in strings(path.read_text(encoding="utf-8"))
        for problem in found(text)
        if not problem[1:].lower().startswith(FIELD_TERMS.get(package.name, ("\0",)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    wrong = [f"{page}:{n}: {problem}" for n, line in enumerate(lines, 1) for problem in found(line)]
    assert not wrong, "\n".join(wrong)


def test_a_retired_word_is_found() -> None:
    assert found("The knob lacks a law.")
    assert not found("The setting has no sampling distribution; null where it does not apply.")
