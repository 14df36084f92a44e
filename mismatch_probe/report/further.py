"""The section of what the same data say besides: supports, entropy, tails, straight lines and temperature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mismatch_probe.metrics.catalog import in_order
from mismatch_probe.report.data import diagonal_pairs
from mismatch_probe.report.format import NONE, digits_of, metric_title
from mismatch_probe.report.model import Cell, Section, columns, estimate, numeric, row, section, table

if TYPE_CHECKING:
    from mismatch_probe.results.comparison import Comparison, Pair
    from mismatch_probe.types import MetricValue

GROUPS = {
    "ratios and supports": (
        "frac_ratio_beyond_2",
        "frac_bitwise_equal",
        "mean_ratio",
        "winsorised_ratio",
        "winsorised_ratio_hidden",
        "mean_inverse_ratio",
        "winsorised_inverse_ratio",
        "winsorised_inverse_ratio_hidden",
        "median_log_ratio",
        "first_order_residual",
    ),
    "one token against the rest": ("binary_tv", "binary_kl", "kl_entropy_ratio"),
    "tails": ("tail_slope", "seq_max_token_kl_p50", "seq_max_token_kl_p90", "seq_max_token_kl_max"),
    "line and temperature": (
        "logprob_slope",
        "logprob_offset",
        "logprob_slope_seq_p10",
        "logprob_slope_seq_p90",
        "temperature_rollout_side",
        "temperature_trainer_side",
    ),
    "direction": ("score_drift",),
}
"""Metrics of the table by what they are about."""
# Shown beside its companions, but no reason for a table of its own.
_COMPANIONS = {"mean_ratio"}
_LEGEND = (
    "With 95 % intervals over prompts. E[ρ] = 1 if the rollout's log-probs are those that tokens were sampled from, "
    "E[1/ρ] = 1 if the trainer's are; winsorised means cap the largest thousandth. A slope other than 1 points at a "
    "temperature. The two temperatures are exact for one fault each, so compare the one whose E is 1. Why a value is "
    "missing, or what it was tested against, stands under “All metrics”."
)


def _cell(value: MetricValue | None) -> Cell:
    """Near 1 its distance from 1 counts."""
    if value is None or value.value is None:
        return Cell(NONE)
    return estimate(value, digits=digits_of(value.value))


def _with_ratios(keys: Iterable[str], pairs: Iterable[Pair]) -> list[str]:
    """`keys`, and behind the F(τ) among them those of other τ that a pair has."""
    beyond = in_order(key for pair in pairs for key in pair.metrics if key.startswith("frac_ratio_beyond_"))
    return [one for key in keys for one in (beyond if key == "frac_ratio_beyond_2" else [key])]


def further_section(summary: Comparison) -> tuple[Section, ...]:
    """A row per metric that some pair of equal dtypes has; no section without any."""
    pairs = diagonal_pairs(summary)
    rows = [
        row(about, metric_title(key), *(_cell(pair.metrics.get(key)) for pair in pairs.values()))
        for about, keys in GROUPS.items()
        for key in _with_ratios(keys, pairs.values())
        if any((found := pair.metrics.get(key)) is not None and found.value is not None for pair in pairs.values())
    ]
    titles = {metric_title(key) for key in _COMPANIONS}
    if all(cells[1].text in titles for cells in rows):
        return ()
    return section(
        "further", "More of the same data", table(columns("about", "metric", *numeric(*pairs)), rows, _LEGEND)
    )
