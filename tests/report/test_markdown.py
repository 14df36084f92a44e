from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from mismatch_probe.report.html import guides
from mismatch_probe.report.markdown import escape, render_markdown

FIGURES = {name: f"{name}.png" for name in guides()}

if TYPE_CHECKING:
    from mismatch_probe.report.data import ReportData


def _tables(document: str) -> list[list[str]]:
    blocks = [block.split("\n") for block in document.strip().split("\n\n")]
    return [lines for lines in blocks if lines[0].startswith("| ")]


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


@pytest.mark.parametrize("run", ["data", "exact", "hostile", "empty"])
def test_every_table_is_rectangular_and_no_html_gets_through(run: str, request: pytest.FixtureRequest) -> None:
    document = render_markdown(request.getfixturevalue(run), FIGURES)
    for table in _tables(document):
        assert len({len(_cells(line)) for line in table}) == 1
    assert set(re.findall(r"<[^>]*>", document)) <= {"<br>"}
    assert not re.search(r"(?<!\\)[`$@~]", document)
    assert not re.search(r"https?://", document)
    document.encode("utf-8")


def test_the_document_says_what_the_page_says(data: ReportData) -> None:
    document = render_markdown(data, FIGURES)
    order = [
        "The gap in BF16 is 7.90",
        "Limits: 1 fail",
        "| bfloat16 | 4.00e-2<br>",
        "policy.png",
        "## All metrics",
        "“ therefore”",
    ]
    order += ["batches form by arrival", "## Self-noise", "## Provenance", "ab" * 32]
    places = [document.index(text) for text in order]
    assert places == sorted(places)
    assert "float16 → bfloat16 is missing: no float16 in vLLM" in document


def test_exact_tables_stand_before_the_figures(exact: ReportData) -> None:
    document = render_markdown(exact, FIGURES)
    order = ["## Exact divergence", "### Estimators of KL(μ‖π)", "| bfloat16 | exact rows |", "## Error budget"]
    order += ["Errors".lower(), "policy.png", "## Where the gap lies", "| kind of token | special |", "## All metrics"]
    places = [document.index(text) for text in order]
    assert places == sorted(places)
    assert "| 4.64 % |" in document


def test_figures_are_linked_by_their_relative_path(data: ReportData) -> None:
    document = render_markdown(data, {"ccdf": "my figures/ccdf.png"})
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document) == ["my%20figures/ccdf.png"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("`x`", r"\`x\`"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("[a](b)", r"\[a\](b)"),
        ("*_#~$@!", r"\*\_\#\~\$\@\!"),
        ("back\\slash", r"back\\slash"),
        ("http://x", r"http\://x"),
        ("www.x", r"www\.x"),
        ("4.18e-2: 1", "4.18e-2: 1"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert escape(text) == escaped
