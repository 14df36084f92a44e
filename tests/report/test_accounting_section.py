"""The table of what a dump holds in place of log-probs: every finding has a row, in every renderer, escaped."""

from __future__ import annotations

import numpy as np

from mismatch_probe.ingest.accounting import CODES
from mismatch_probe.report import accounting
from mismatch_probe.report.accounting import accounting_section
from mismatch_probe.report.model import Items, Report, Table
from mismatch_probe.report.render.html import html_page
from mismatch_probe.report.render.markdown import markdown_page
from mismatch_probe.report.words import all_words
from tests.ingest.test_accounting import accounted, clean, rows_of


def test_every_code_has_a_title() -> None:
    assert set(accounting._TITLES) == set(CODES)


def test_rows_in_order_with_places_and_fix() -> None:
    b, a = clean(300)
    b[:7], b[10], b[50:80] = -9999.0, np.nan, -1.0
    findings = accounted(rows_of(b, a, [100, 0, 200]))
    (section,) = accounting_section(findings)
    shown, told = section.blocks
    assert isinstance(shown, Table)
    assert isinstance(told, Items)
    said = [tuple(cell.text for cell in row) for row in shown.rows]
    assert said == [
        ("-9999 for a log-prob", "rollout", "7", "2.33 %", "d.jsonl:1[0]"),
        ("nan for a log-prob", "rollout", "1", "0.333 %", "d.jsonl:1[10]"),
        ("runs of -1", "rollout", "30", "10.0 %", "d.jsonl:1[50]"),
        ("no response", "–", "1", "33.3 %", "d.jsonl:2"),
    ]
    assert [item.text.partition(":")[0] for item in told.items] == [finding.severity for finding in findings]
    for item, finding in zip(told.items, findings, strict=True):
        assert item.text.endswith(all_words()[finding.code].fix)


def test_no_finding_no_section() -> None:
    assert accounting_section(()) == ()


def test_names_of_files_are_escaped() -> None:
    b, a = clean(20)
    b[3] = np.nan
    (found,) = accounted(rows_of(b, a, [20]))
    hostile = found.model_copy(
        update={"values": {**found.values, "places": ("<script>x</script>|\x1b[31m.jsonl:1[3]",)}}
    )
    report = Report("t", "warn", ("a",), sections=accounting_section((hostile,)))
    for text in (html_page(report, {}), markdown_page(report, {})):
        assert "<script>x" not in text
        assert "\x1b" not in text
