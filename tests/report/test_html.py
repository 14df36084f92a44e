from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from mismatch_probe.report.html import guides, render_html

if TYPE_CHECKING:
    from pathlib import Path

    from mismatch_probe.report.data import ReportData

VOID = {"meta", "img", "br"}
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "section",
    "h1",
    "h2",
    "h3",
    "p",
    "ul",
    "li",
    "b",
    "code",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "small",
    "figure",
    "figcaption",
    "img",
    "details",
    "summary",
    "bdi",
    "mark",
}


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails when elements are not properly nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Path]:
    """Files in place of figures, each with bytes of its own."""
    paths = {name: tmp_path / f"{name}.png" for name in guides()}
    for name, path in paths.items():
        path.write_bytes(b"\x89PNG " + name.encode())
    return paths


def test_the_page_reads_in_order(data: ReportData, figures: dict[str, Path]) -> None:
    page = Page(render_html(data, figures))
    sections = [attributes["id"] for attributes in page.attributes("section")]
    assert sections == [
        "findings",
        "matrix",
        "exact",
        "budget",
        "figures",
        "where",
        "metrics",
        "worst",
        "passes",
        "self-noise",
        "provenance",
    ]
    order = [
        "The gap in BF16 is 7.90",
        "Limits: 1 fail",
        "4.00e-2",
        "All metrics",
        " therefore",
        "batches form by arrival",
        "Provenance",
    ]
    places = [page.text.index(text) for text in order]
    assert places == sorted(places)
    assert "no float16 in vLLM" in page.text
    assert len(page.attributes("details")) == 2


def test_the_policy_allows_images_and_exactly_this_style(data: ReportData, figures: dict[str, Path]) -> None:
    page = Page(render_html(data, figures))
    (policy,) = [
        meta["content"] for meta in page.attributes("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "<" not in page.style


@pytest.mark.parametrize("run", ["data", "exact", "hostile", "empty"])
def test_nothing_in_the_page_acts_or_leaves_it(
    run: str, figures: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    html = render_html(request.getfixturevalue(run), figures)
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= ALLOWED
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in {"style", "href", "srcset"}}
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", page.style)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", html)
    html.encode("utf-8")


def test_hostile_text_is_shown_as_text(hostile: ReportData) -> None:
    page = Page(render_html(hostile, {}))
    assert "<script>alert(1)</script>⟨U+001B⟩[31m⟨U+202E⟩[bold]|`$x$`" in page.text
    assert "A" * 500 in page.text  # a reason is shown in full
    token = page.text[page.text.index("Worst tokens") : page.text.index("What each pass")]
    assert "A" * 161 not in token


def test_figures_are_embedded_with_a_guide_each(data: ReportData, figures: dict[str, Path]) -> None:
    page = Page(render_html(data, figures))
    images = page.attributes("img")
    embedded = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert embedded == [figures[name].read_bytes() for name in guides()]
    assert all(image["alt"] for image in images)
    assert len(page.attributes("figcaption")) == len(guides())


def test_absent_figures_are_left_out(data: ReportData, figures: dict[str, Path]) -> None:
    del figures["where"]
    assert len(Page(render_html(data, figures)).attributes("img")) == len(guides()) - 1


def test_an_empty_run_says_what_is_not_there(empty: ReportData) -> None:
    text = Page(render_html(empty, {})).text
    for sentence in (
        "No finding was recorded.",
        "No pair was compared.",
        "No rows of logits were compared",
        "No reference has scored these tokens",
        "The tokens were not sorted.",
        "No figures were drawn.",
        "No pass is recorded.",
        "Self-noise was not measured",
    ):
        assert sentence in text


def test_the_exact_parts_follow_the_matrix_and_the_long_table_is_folded(exact: ReportData) -> None:
    page = Page(render_html(exact, {}))
    order = ["Exact divergence", "Estimators of KL", "22,832,564,803,474", "Error budget", "hf-float64-cast", "Figures"]
    order += ["Where the gap lies", "15 bins", "50.0 % of Σd²", "All metrics", "share of Σd²", "4.64 %"]
    places = [page.text.index(text) for text in order[:1]]
    for text in order[1:]:
        places.append(page.text.index(text, places[-1]))
    assert len(page.attributes("details")) == 3


def test_every_table_scrolls_in_a_box_of_its_own(exact: ReportData, figures: dict[str, Path]) -> None:
    page = Page(render_html(exact, figures))
    names = [tag for tag, _ in page.tags]
    for index, tag in enumerate(names):
        if tag in {"table", "img"}:
            assert page.tags[index - 1] == ("div", page.tags[index - 1][1])
            assert page.tags[index - 1][1]["class"] == "scroll"
