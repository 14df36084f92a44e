from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from mismatch_probe.report.terminal import print_summary
from tests.report.terminal_text import assert_fits

if TYPE_CHECKING:
    from mismatch_probe.report.data import ReportData


def _printed(data: ReportData, width: int, *, color: bool = False) -> str:
    out = io.StringIO()
    print_summary(data, Console(file=out, width=width, force_terminal=color, legacy_windows=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("run", ["data", "exact", "hostile", "empty"])
def test_lines_fit_and_hold_no_control_character(run: str, width: int, request: pytest.FixtureRequest) -> None:
    text = _printed(request.getfixturevalue(run), width)
    assert_fits(text, width)


def test_at_100_columns_each_pair_is_one_line(data: ReportData) -> None:
    lines = _printed(data, 100).split("\n")
    row = next(line for line in lines if line.startswith("bfloat16 → bfloat16"))
    assert row.split() == [
        "bfloat16",
        "→",
        "bfloat16",
        "4.00e-2",
        "[3.60e-2,",
        "4.40e-2]",
        "1.2e-4",
        "1.60e-3",
        "0.930",
        "1.20",
        "10,240",
    ]


def test_without_exact_values_no_column_is_spent_on_them(data: ReportData) -> None:
    assert "exact" not in _printed(data, 80)


def test_on_a_colour_terminal_only_styling_is_escaped(hostile: ReportData) -> None:
    styled = _printed(hostile, 100, color=True)
    assert "\x1b[" in styled
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;]*m", "", styled))
    assert "\x1b[31malert" not in styled


def test_a_run_without_pairs_says_so(empty: ReportData) -> None:
    assert "No pair was compared." in _printed(empty, 80)
