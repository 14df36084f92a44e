from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.report import view, view_exact

if TYPE_CHECKING:
    from conftest import SummaryFactory

    from mismatch_probe.report.data import ReportData


def test_the_exact_matrix_has_value_interval_and_flips(exact: ReportData) -> None:
    table = view_exact.exact_table(exact.summary)
    assert table.header == ("rollout μ ↓  trainer π →", "bfloat16", "float16", "float32")
    assert table.rows[1][2] == "2.25e-5\n[2.03e-5, 2.48e-5]\nlikeliest token differs: 1.25 %"


def test_a_cell_without_exact_value_says_why(exact: ReportData) -> None:
    exact.summary["pairs"][4]["metrics"]["kl_exact"] = {"value": None, "why": "no compared row is finite"}
    assert view_exact.exact_table(exact.summary).rows[1][2] == "–\nno compared row is finite"


def test_estimators_come_exact_first_with_their_cost_as_a_count(exact: ReportData) -> None:
    table = view_exact.estimators_table(exact.summary)
    assert [row[:2] for row in table.rows[:5]] == [
        ("bfloat16", "exact rows"),
        ("bfloat16", "k1 = −d"),
        ("bfloat16", "k2 = ½d²"),
        ("bfloat16", "k3 = eᵈ − 1 − d"),
        ("float16", "exact rows"),
    ]
    assert table.rows[1][2:] == ("1.60e-3", "0", "4.00e-2", "22,832,564,803,474")
    assert len(table.rows) == 12


def test_an_estimator_of_a_gap_of_zero_needs_no_number_of_tokens(exact: ReportData) -> None:
    exact.summary["pairs"][0]["estimators"][0]["tokens_needed"] = None
    assert view_exact.estimators_table(exact.summary).rows[1][-1] == "–"


def test_the_budget_has_a_row_per_pair_and_reasons_only_where_a_value_is_absent(exact: ReportData) -> None:
    exact.summary["pairs"][0]["budget"]["rollout_error_rms"]["why"] = "uncalibrated: 8 prompts"
    table = view_exact.budget_table(exact.summary)
    assert [row[0] for row in table.rows][:2] == ["bfloat16 → bfloat16", "bfloat16 → float16"]
    assert len(table.rows) == 9
    assert table.rows[0][1] == "6.00e-2\n[5.40e-2, 6.60e-2]"
    assert table.rows[0][table.header.index("measured / predicted")] == "–\none side is the reference itself"


def test_the_budget_says_what_it_is_against(exact: ReportData) -> None:
    text = view_exact.budget_text(exact.summary)
    assert "against hf-float64-cast" in text
    assert "charges every difference of implementation to vLLM" in text
    assert text.endswith("Noise floor of a float32 reference: 4.00e-6 [3.60e-6, 4.40e-6] nats.")
    assert "Noise floor" not in view_exact.budget_text(exact.summary | {"reference": "hf-float32-cast"})


def test_where_has_a_row_per_bin_and_a_column_per_pair(exact: ReportData) -> None:
    del exact.summary["where"]["float16"]["token_kind"][2]
    table = view_exact.where_table(exact.summary)
    assert table.header == ("property", "bin", "bfloat16", "float16", "float32")
    assert len(table.rows) == 15
    assert table.rows[0][2] == "50.0 % of Σd²\n16.7 % of tokens (1,000)\nmean |d| 1.00e-2 [9.00e-3, 1.10e-2]"
    special = next(row for row in table.rows if row[1] == "special")
    assert special[2] == "16.7 % of Σd²\n50.0 % of tokens (3,000)\nmean |d| 1.00e-2"
    assert special[3] == "–"


def test_an_old_summary_has_none_of_these_rows(make_summary: SummaryFactory) -> None:
    for summary in ({}, make_summary()):
        for table in (
            view_exact.exact_table(summary),
            view_exact.estimators_table(summary),
            view_exact.budget_table(summary),
            view_exact.where_table(summary),
        ):
            assert table.rows == ()


def test_worst_tokens_carry_their_share_of_the_squared_gap(exact: ReportData) -> None:
    assert view.worst_rows(exact.worst_tokens)[0].share_of_square == "4.64 %"
