from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.report import model
from mismatch_probe.report.format import EDGES, level
from mismatch_probe.report.model import Cell, Column, Report, Step, Text, Token, TokenSequence, section, table
from mismatch_probe.report.render import write_report
from mismatch_probe.report.render.html import html_page
from mismatch_probe.report.render.markdown import markdown_page
from mismatch_probe.report.render.terminal import fitting, print_report
from tests.snapshot import assert_snapshots, screen

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\x1b[31m\u202e[a](javascript:b) `c` | d\n~~~~\n# e @f"


def everything(text: str) -> Report:
    """A report with every kind of block, and `text` wherever text can stand."""
    numbers = table(
        [text, Column("value", numeric=True), Column("why", rank=1)],
        [[text, Cell("1.5", "[1, 2]", text), text]],
        text,
    )
    tokens = model.Tokens((TokenSequence(text, (Token(text, -1.0, -1.5, 2.0, 3), Token(" b", -1.0, float("nan")))),))
    blocks = (Text(text, "strong"), model.Items((Text(text),)), numbers, model.Code(text, text), tokens)
    sections = [section(depth, text, *blocks, depth=depth) for depth in ("screen", "page", "detail")]
    return Report(
        title=text,
        state="warn",
        answer=(text, text),
        steps=(Step(text, text),),
        table=numbers,
        notes=(Text(text, "note"),),
        sections=tuple(one for found in sections for one in found),
    )


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""


def parsed(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


def test_the_three_renderings_of_every_block() -> None:
    assert_snapshots("every-block", everything("a | b < c\nd"))


@given(st.text(min_size=1))
def test_no_text_becomes_markup_of_a_page(text: str) -> None:
    found, plain = parsed(html_page(everything(text), {})), parsed(html_page(everything("a"), {}))
    breaks = [[tag for tag in page.tags if tag != "br"] for page in (found, plain)]
    assert breaks[0] == breaks[1]
    assert [name for name, _ in found.attributes] == [name for name, _ in plain.attributes]


def test_a_page_runs_nothing_and_asks_for_nothing() -> None:
    page = html_page(everything(HOSTILE), {})
    found = parsed(page)
    assert not {"script", "link", "iframe", "object", "form", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("href", "src", "style")]
    assert "default-src 'none'" in found.policy
    assert "\x1b" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize("text", [HOSTILE, "https://a.b www.c.d", "a\n~~~~\n<b>", "**x** _y_ ![z](w)"])
def test_markdown_shows_hostile_text_as_it_stands(text: str) -> None:
    page = markdown_page(everything(text), {})
    outside = re.sub(r"^~~~~\n.*?^~~~~$", "", page, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"</?(details|summary)>|<br>", "", outside)
    assert not re.search(r"[<>]", rest)
    assert "](" not in outside.replace("\\](", "").replace("]\\(", "")
    assert "\x1b" not in page
    assert "www." not in outside


def test_a_snippet_cannot_end_its_block() -> None:
    page = markdown_page(Report("a", "none", ("b",), (Step("c", "d\n~~~~\ne"),)), {})
    assert len(re.findall(r"^~~~~", page, re.MULTILINE)) == 2


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_terminal_shows_no_control_character_and_no_line_too_long(width: int) -> None:
    report = everything("a word and another " * 9)
    uncut = ("  a word", "    ")  # commands and snippets, which are to be copied
    assert all(len(line) <= width or line.startswith(uncut) for line in screen(report, width).splitlines())
    assert "\x1b" not in screen(everything(HOSTILE), width)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=9),
    st.integers(10, 200),
)
def test_columns_that_fit(columns: list[tuple[int, int]], width: int) -> None:
    widths, ranks = [list(values) for values in zip(*columns, strict=True)]
    shown = fitting(widths, ranks, width)
    total = sum(widths[index] for index in shown) + 2 * (len(shown) - 1)
    assert total <= width or all(ranks[index] == 0 for index in shown)
    assert {index for index, rank in enumerate(ranks) if rank == 0} <= set(shown)
    dropped = set(range(len(widths))) - set(shown)
    assert all(ranks[out] >= ranks[kept] for out in dropped for kept in shown)


def test_a_wide_terminal_shows_every_column_on_one_line_per_row() -> None:
    rows = [["bfloat16 → bfloat16", Cell("4.35e-2", "[4.02e-2, 4.64e-2]"), Cell("0.9")]]
    columns = ["pair", Column("mean |d|", True), Column("ESS", True, 1)]
    report = Report("t", "none", ("a",), table=table(columns, rows))
    assert "bfloat16 → bfloat16  4.35e-2 [4.02e-2, 4.64e-2]  0.9" in screen(report, 80)
    narrow = screen(report, 48)
    assert "4.35e-2 [4.02e-2, 4.64e-2]" in narrow
    assert "Not shown at this width: ESS." in narrow


def test_levels_of_a_token() -> None:
    assert [level(Token("a", -1.0, -1.0 - edge * 1.001)) for edge in EDGES] == list(range(1, 8))
    assert level(Token("a", -1.0, -1.0)) == 0
    assert level(Token("a", -1.0, float("nan"))) == level(Token("a", float("-inf"), -1.0)) == 8


def test_a_token_view_of_long_responses_stays_below_5_mib() -> None:
    tokens = tuple(Token(" word", -1.234567, -1.239876, 2.345, 12) for _ in range(1000))
    view = model.Tokens(tuple(TokenSequence(f"sequence {index}", tokens) for index in range(24)))
    page = html_page(Report("a", "none", ("b",), sections=section("tokens", "Tokens", view)), {})
    assert page.count('data-x="') == 24_000
    assert len(page.encode()) < 5 << 20


def test_a_section_that_says_nothing_is_left_out() -> None:
    assert section("a", "A", Text("a legend"), table(["x"], [])) == ()
    assert section("a", "A", None, Text("t"), table(["x"], [["1"]]))[0].blocks[0] == Text("t")


def test_both_pages_are_written(tmp_path: Path) -> None:
    write_report(everything("a"), {}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_colour_is_left_to_the_console() -> None:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=80, force_terminal=True, color_system="truecolor")
    print_report(everything("a"), console)
    assert "\x1b[" in console.file.getvalue()  # type: ignore[attr-defined]
