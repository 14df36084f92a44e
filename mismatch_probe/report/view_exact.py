"""Tables of what needs more than two log-probs per token: full rows of logits, a reference, properties of the tokens.

As in `view`, every string has been through `visible` and none has been escaped. A table without rows has nothing to
show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.report.format import NONE, count, estimate, interval, number, percent, visible
from mismatch_probe.report.matrix import (
    EXACT,
    diagonal_pairs,
    dtype_order,
    metric_matrix,
    modes_of,
    noise_floor,
    ordered_pairs,
    pair_label,
    reading,
)
from mismatch_probe.report.names import WHERE_TITLES, bin_order
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from mismatch_probe.metrics.where import WhereBin
    from mismatch_probe.report.matrix import Cell
    from mismatch_probe.results.comparison import Comparison

TEXTS = {
    "exact": "KL(μ‖π) in nats per token, summed over the whole vocabulary at the positions whose rows of logits were "
    "kept, with its 95 % interval over prompts.",
    "no_exact": "No rows of logits were compared; compare --exact-kl keeps some.",
    "estimators": "What each estimator converges to, in nats, how far that is from KL(μ‖π), and how many independent "
    "tokens it needs for ±10 % with 95 % confidence: from the full rows, without sampling noise, over the positions "
    "that were compared.",
    "no_budget": "No reference has scored these tokens, so nothing says whose errors make the gap.",
    "no_where": "The tokens were not sorted.",
}
"""What stands above each table, or in its place, in every format."""
_ESTIMATORS = {"kl_exact": "exact rows", "kl_k1": "k1 = −d", "kl_k2": "k2 = ½d²", "kl_k3": "k3 = eᵈ − 1 − d"}
_ERRORS = {
    "rollout_error_rms": "error of μ",
    "trainer_error_rms": "error of π",
    "predicted_gap_rms": "predicted gap",
    "measured_gap_rms": "measured gap",
    "measured_over_predicted": "measured / predicted",
    "error_correlation": "correlation of errors",
}


def exact_table(summary: Comparison) -> Table:
    """Exact KL(μ‖π) of every pair with its interval and, below, how often the likeliest token differs.

    What limits a value is said once, in the notes.
    """
    matrix = metric_matrix(summary, EXACT)
    header = ("rollout μ ↓  trainer π →", *(visible(column) for column in matrix.columns))
    if not any(cell.value is not None for cell in matrix.cells.values()):
        return Table(header, ())
    flips = metric_matrix(summary, "top1_flip_rate")
    rows = [
        (
            visible(row),
            *(_exact_cell(matrix.cell(row, column), flips.cell(row, column)) for column in matrix.columns),
        )
        for row in matrix.rows
    ]
    return Table(header, tuple(rows))


def _exact_cell(cell: Cell, flips: Cell) -> str:
    if cell.value is None:
        return stacked(NONE, visible(cell.why))
    flip = "" if flips.value is None else f"likeliest token differs: {percent(flips.value)}"
    return stacked(number(cell.value), interval(cell.ci_low, cell.ci_high), flip)


def estimators_table(summary: Comparison) -> Table:
    """Per pair of equal dtypes: what the full rows and each sampled estimator of KL(μ‖π) cost."""
    rows = []
    for label, pair in diagonal_pairs(summary).items():
        costs = {cost.key: cost for cost in pair.estimators or ()}
        for key, name in _ESTIMATORS.items():
            cost = costs.get(key)
            if cost is not None:
                values = map(number, (cost.mean, cost.bias, cost.standard_deviation))
                rows.append((visible(label), name, *values, count(cost.tokens_needed)))
    header = ("pair", "estimator", "mean", "bias", "standard deviation of one token", "tokens for ±10 %")
    return Table(header, tuple(rows))


def budget_table(summary: Comparison) -> Table:
    """Every pair's errors against the reference, the gap that they predict, and the measured one."""
    modes = modes_of(summary)
    pairs = [pair for pair in ordered_pairs(summary) if pair.budget]
    rows = [
        (visible(pair_label(pair, modes)), *(_with_limits(reading(pair.budget, key)) for key in _ERRORS))
        for pair in pairs
    ]
    return Table(("rollout → trainer", *_ERRORS.values()), tuple(rows))


def budget_text(summary: Comparison) -> str:
    """What the errors are against, and what has to be known to read them."""
    text = (
        f"RMS over tokens, nats, against {visible(summary.reference or 'an unnamed reference')}. A Hugging Face "
        "reference charges every difference of implementation to vLLM; the float32–float32 pair shows how large those "
        "are. Predicted: √((error of μ)² + (error of π)²), the gap if the two errors are independent."
    )
    floor = noise_floor(summary)
    if floor is None:
        return text
    return f"{text} Noise floor of a float32 reference: {estimate(floor.value, floor.ci_low, floor.ci_high)} nats."


def _with_limits(cell: Cell) -> str:
    """Value and interval; a reason only where there is no value, since what limits one limits the whole row."""
    why = visible(cell.why) if cell.value is None else ""
    return stacked(number(cell.value), interval(cell.ci_low, cell.ci_high), why)


def where_table(summary: Comparison) -> Table:
    """Per property of a token and bin: contribution to Σ d², fraction of tokens, and mean |d|; a column per pair."""
    where, pairs = summary.where, dtype_order(summary.where)
    rows = []
    for key, title in WHERE_TITLES.items():
        bins = {name: {row.label: row for row in where[name].get(key, ())} for name in pairs}
        for label in bin_order(label for found in bins.values() for label in found):
            cells = (_where_cell(bins[name].get(label)) for name in pairs)
            rows.append((title, visible(label), *cells))
    return Table(("property", "bin", *(visible(name) for name in pairs)), tuple(rows))


def _where_cell(row: WhereBin | None) -> str:
    if row is None:
        return NONE
    mean = f"mean |d| {number(row.mean_abs)} {interval(row.ci_low, row.ci_high)}"
    tokens = f"{percent(row.fraction_of_tokens)} of tokens ({count(row.n_tokens)})"
    return stacked(f"{percent(row.contribution)} of Σd²", tokens, mean.rstrip())
