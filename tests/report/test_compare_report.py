from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mismatch_probe.report.compare import compare_report, pairs_table
from mismatch_probe.report.data import ReportData
from mismatch_probe.report.model import Table, Token, TokenSequence
from mismatch_probe.report.render.html import html_page
from mismatch_probe.report.render.markdown import markdown_page
from mismatch_probe.results.finding import Finding
from tests.factories.comparison import make_comparison, make_growth, make_limit
from tests.factories.manifest import finished_manifest
from tests.factories.report_data import make_report_data
from tests.report.test_render import parsed
from tests.snapshot import assert_snapshots, screen

TOKENS = TokenSequence("bfloat16: sequence 3 of prompt math-017", (Token("x", -0.5, -0.6, 1.2, 0), Token("\n", -3, -5)))


def everything(data: ReportData, exact: ReportData) -> ReportData:
    summary = exact.summary.model_copy(
        update={"missing": data.summary.missing, "limits": data.summary.limits, "length": {"bfloat16": make_growth()}}
    )
    return replace(data, summary=summary, tokens=(TOKENS,), folder=Path("runs/tiny"))


def test_the_three_renderings(data: ReportData, exact: ReportData) -> None:
    assert_snapshots("compare", compare_report(everything(data, exact)))


KINDS: dict[str, tuple[Finding, str, list[str]]] = {
    "rounding": (
        Finding(code="kind-rounding", severity="info", values={"dtypes": ("bfloat16",)}),
        "ok",
        ["mismatch-probe audit --resume 'runs/a model'"],
    ),
    "more": (
        Finding(code="kind-more-than-rounding", severity="warn", values={"evidence": ("size",)}),
        "warn",
        ["mismatch-probe attribute --resume 'runs/a model'"],
    ),
    "unclear": (
        Finding(code="kind-unclear", severity="note", values={"open": ("fp32-floor",), "more_prompts": 36}),
        "inconclusive",
        ["mismatch-probe compare --model smollm2-135m --num-prompts 100"],
    ),
    "no prompts settle it": (
        Finding(code="kind-unclear", severity="note", values={"open": ("no-fp32",), "more_prompts": None}),
        "inconclusive",
        [],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_is_the_kind_of_gap_and_the_next_command_follows_from_it(name: str) -> None:
    kind, state, commands = KINDS[name]
    manifest = finished_manifest()
    manifest.prompts.n = 64
    summary = make_comparison(findings=(*make_comparison().findings, kind))
    report = compare_report(make_report_data(summary=summary, manifest=manifest, folder=Path("runs/a model")))
    assert report.state == state
    assert len(report.answer) == 2
    assert not report.notes
    assert [step.command for step in report.steps] == commands


def test_a_run_that_did_not_finish_says_how_to_go_on() -> None:
    manifest = finished_manifest().model_copy(update={"status": "incomplete"})
    report = compare_report(make_report_data(manifest=manifest, folder=Path("runs/tiny")))
    assert report.steps[0].command == "mismatch-probe compare --resume runs/tiny"


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_limit_that_is_not_met_decides_the_state(verdict: str) -> None:
    summary = make_comparison(limits=(make_limit("kl_k3>1", 2.0, "ok"), make_limit("kl_k3>1e-9", 2.0, verdict)))
    report = compare_report(make_report_data(summary=summary))
    assert report.state == "fail"
    (limits,) = [section for section in report.sections if section.name == "limits"]
    (found,) = limits.blocks
    assert isinstance(found, Table)
    assert [row[2].text for row in found.rows] == [verdict, "ok"]


def test_every_pair_is_in_the_table_and_every_missing_one_is_named(data: ReportData) -> None:
    found = pairs_table(data.summary)
    assert found is not None
    assert len(found.rows) == len(data.summary.pairs)
    assert "float16 → bfloat16" in " ".join(note.text for note in compare_report(data).notes)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_pair_takes_one_line_of_a_terminal(data: ReportData, exact: ReportData, width: int) -> None:
    lines = screen(compare_report(everything(data, exact)), width).splitlines()
    pairs = [line for line in lines if re.match(r"\w+ → \w+ +\d", line)]
    assert len(pairs) == len(exact.summary.pairs)
    assert all(re.search(r"\d \[\S+, \S+\]", line) for line in pairs)


def test_nothing_of_a_hostile_run_breaks_out(hostile: ReportData) -> None:
    report = compare_report(replace(hostile, tokens=(replace(TOKENS, title=hostile.summary.model),)))
    page = html_page(report, {})
    assert not {"script", "img", "a"} & set(parsed(page).tags)
    assert "\x1b" not in page + markdown_page(report, {}) + screen(report)
    assert page.encode()
    assert "<script" not in markdown_page(report, {})


def test_an_empty_run_says_so(empty: ReportData) -> None:
    report = compare_report(empty)
    assert report.table is None
    assert report.answer
