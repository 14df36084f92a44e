from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.terminal import print_summary
from tests.report.terminal_text import assert_fits

if TYPE_CHECKING:
    from conftest import SummaryFactory


def _printed(data: ReportData, width: int, *, color: bool = False) -> str:
    out = io.StringIO()
    print_summary(data, Console(file=out, width=width, force_terminal=color, legacy_windows=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("run", ["data", "exact", "hostile", "empty", "sparse"])
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


@pytest.mark.parametrize("width", [80, 100])
def test_exact_kl_stands_beside_its_estimate_or_below_it(exact: ReportData, width: int) -> None:
    text = _printed(exact, width)
    assert "…" not in text
    lines = text.split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("float16 → float16"))
    cells = lines[at].split()
    if width >= 100:
        assert cells[6:9] == ["0", "2.50e-5", "2.25e-5"]
    else:
        assert cells[4:6] == ["0", "2.50e-5"]
        assert lines[at + 1].split()[-1] == "2.25e-5"
    assert "KL exact" in text
    assert "KL exact: the same from full rows" in " ".join(text.split())


def test_without_exact_values_no_column_is_spent_on_them(data: ReportData) -> None:
    assert "exact" not in _printed(data, 80)


@pytest.mark.parametrize("modes", [("cast",), ("cast", "autocast")])
def test_at_80_columns_no_number_is_cut(make_summary: SummaryFactory, modes: tuple[str, ...], data: ReportData) -> None:
    text = _printed(ReportData(make_summary(modes=modes), {}, data.curves, []), 80)
    assert "…" not in text
    assert text.count("[3.6e-2, 4.4e-2]") == 5 * len(modes)
    assert ("(autocast)" in text) == (len(modes) > 1)


def test_everything_that_must_be_said_is_said(data: ReportData) -> None:
    data.summary["pairs"][0]["metrics"]["kl_k3"]["why"] = "uncalibrated: 8 prompts"
    text = " ".join(_printed(data, 100).split())
    for part in (
        "smollm2-135m (trainer: cast)",
        "BF16 is 7.9× [7.0, 8.9] further apart than FP16.",
        "uncalibrated: 8 prompts",
        "Missing: float16 → bfloat16: vLLM refused float16",
        "Limit exceeded: kl_k3>0.001@bfloat16/bfloat16: measured 2.00e-3",
        "Limit not judged: ess_seq>2@float16",
        "“ therefore” (math-017, position 41): log μ -3.20, log π -4.90",
    ):
        assert part in text


def test_no_text_is_markup(data: ReportData) -> None:
    summary = data.summary | {"model": "[red]model[/red]", "findings": [{"text": "[red]finding[/red]"}]}
    summary["missing"] = [{"rollout_dtype": "[red]dtype[/red]", "why": "[red]missing[/red]"}]
    summary["limits"] = [{"limit": "kl_k3>1@float16", "why": "[red]limit[/red]"}]
    worst = replace(data.worst_tokens[0], token_text="[red]token[/red]", prompt_id="[red]prompt[/red]")
    text = _printed(ReportData(summary, {"status": "[red]status[/red]"}, data.curves, [worst]), 160)
    for name in ("model", "finding", "dtype", "missing", "limit", "token", "prompt", "status"):
        assert f"[red]{name}[/red]" in text


def test_on_a_colour_terminal_only_styling_is_escaped(hostile: ReportData) -> None:
    styled = _printed(hostile, 100, color=True)
    assert "\x1b[" in styled
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;]*m", "", styled))
    assert "\x1b[31malert" not in styled


def test_a_run_without_pairs_says_so(empty: ReportData) -> None:
    assert "No pair was compared." in _printed(empty, 80)
