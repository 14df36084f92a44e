"""A run's report as plain strings, in the order it is read: what HTML, Markdown and terminal have in common.

Every string has been through `visible`, none has been escaped. What a summary or manifest lacks is left out or shown
as `–`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mismatch_probe.report.format import NONE, clipped, count, interval, number, percent, visible
from mismatch_probe.report.matrix import (
    DEFAULT_METRIC,
    diagonal_pairs,
    metric_matrix,
    null_of,
    pair_label,
    reading,
    trainer_modes,
)
from mismatch_probe.report.names import catalog_order, metric_formula, metric_title

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mismatch_probe.report.data import ReportData, WorstToken
    from mismatch_probe.report.matrix import Cell

HEADLINE_METRICS = {
    DEFAULT_METRIC: "mean |Δlogp|",
    "kl_k3": "KL k3",
    "kl_exact": "KL exact",
    "ess_seq": "ESS",
    "max_abs_logprob_diff": "worst",
}
"""What the terminal shows of a pair, and what it calls it."""
HEADLINES = 2
"""How many findings, the first ones, are the result in a nutshell; the others are details of it."""
TOKEN_CHARACTERS, CONTEXT_CHARACTERS = 60, 160
_COUNTS = ("n_sequences", "n_tokens", "n_nonfinite", "n_truncated", "n_empty", "n_dropped")

State = Literal["exceeded", "not judged", "within"]


@dataclass(frozen=True)
class Table:
    """Rows of strings under a header, named by their first cell; a line break in a cell sets off what is secondary."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LimitLine:
    """A `--fail-on` limit at one pair."""

    state: State
    text: str


@dataclass(frozen=True)
class WorstRow:
    """A worst token, clipped. `token` follows directly on `context`."""

    pair: str
    prompt: str
    sequence: str
    position: str
    token_id: str
    context: str
    token: str
    rollout_logprob: str
    trainer_logprob: str
    log_ratio: str
    share_of_square: str


def model_name(data: ReportData) -> str:
    """The model's name from the summary or, failing that, the manifest."""
    name = data.summary.get("model") or (data.manifest.get("model") or {}).get("name")
    return visible(name or "unnamed model")


def findings(data: ReportData) -> list[str]:
    """The finding sentences."""
    return [visible(finding["text"]) for finding in data.summary.get("findings") or [] if finding.get("text")]


def limit_lines(summary: Mapping[str, Any]) -> list[LimitLine]:
    """Every limit with its state and measured value, the exceeded first, then those that could not be judged."""
    order: tuple[State, ...] = ("exceeded", "not judged", "within")
    lines = [_limit_line(limit) for limit in summary.get("limits") or []]
    return sorted(lines, key=lambda line: order.index(line.state))


def _limit_line(limit: Mapping[str, Any]) -> LimitLine:
    exceeded, value, why = limit.get("exceeded"), limit.get("value"), limit.get("why")
    state: State = "exceeded" if exceeded else "not judged" if exceeded is None or value is None else "within"
    name = str(limit.get("limit") or "?")
    at = "" if "@" in name else f" at {limit.get('rollout_dtype') or '?'}/{limit.get('trainer_dtype') or '?'}"
    reason = f" ({visible(why)})" if why else ""
    return LimitLine(state, f"{visible(name + at)}: measured {number(value)}{reason}")


def verdict(summary: Mapping[str, Any]) -> tuple[State | Literal["none"], str]:
    """The overall state and one sentence about all limits."""
    states = [line.state for line in limit_lines(summary)]
    if not states:
        return "none", "No limits were set; --fail-on sets them."
    parts = [f"{states.count(state)} {state}" for state in ("exceeded", "not judged", "within") if state in states]
    return states[0], f"Limits: {', '.join(parts)}."


def missing_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(pair, why) of every pair that could not be compared."""
    modes = trainer_modes(summary)
    return [
        (visible(pair_label(pair, modes)), visible(pair.get("why") or "no reason recorded"))
        for pair in summary.get("missing") or []
    ]


def matrix_table(summary: Mapping[str, Any]) -> Table:
    """Mean |Δlogp| of every pair, with interval and null below the value."""
    matrix = metric_matrix(summary)
    rows = [
        (visible(row), *(_matrix_cell(matrix.cell(row, column)) for column in matrix.columns)) for row in matrix.rows
    ]
    return Table(("rollout μ ↓  trainer π →", *(visible(column) for column in matrix.columns)), tuple(rows))


def _matrix_cell(cell: Cell) -> str:
    null = "" if cell.null is None else f"null {number(cell.null, 2)}"
    return stacked(number(cell.value), interval(cell.ci_low, cell.ci_high), null, visible(cell.why))


def metrics_table(summary: Mapping[str, Any]) -> Table:
    """All metrics of the diagonal pairs, a column each, and the formula."""
    pairs = diagonal_pairs(summary)
    keys = catalog_order(key for pair in pairs.values() for key in pair.get("metrics") or {})
    rows = []
    for key in keys:
        values = [reading(pair.get("metrics"), key) for pair in pairs.values()]
        cells = (stacked(number(v.value), interval(v.ci_low, v.ci_high), visible(v.why)) for v in values)
        rows.append((stacked(metric_title(key), visible(key)), *cells, metric_formula(key)))
    return Table(("metric", *(visible(label) for label in pairs), "formula"), tuple(rows))


def worst_rows(tokens: Iterable[WorstToken]) -> list[WorstRow]:
    """The worst tokens with their text made safe to show, the end of the context and the start of the token kept."""
    return [
        WorstRow(
            pair=clipped(visible(token.pair), TOKEN_CHARACTERS),
            prompt=clipped(visible(token.prompt_id), TOKEN_CHARACTERS),
            sequence=str(token.sequence_id),
            position=str(token.position),
            token_id=str(token.token_id),
            context=clipped(visible(token.context), CONTEXT_CHARACTERS, keep_end=True),
            token=clipped(visible(token.token_text), TOKEN_CHARACTERS),
            rollout_logprob=number(token.rollout_logprob),
            trainer_logprob=number(token.trainer_logprob),
            log_ratio=number(token.log_ratio),
            share_of_square=percent(token.share_of_square),
        )
        for token in tokens
    ]


def passes_table(manifest: Mapping[str, Any]) -> Table:
    """Per pass: whether it finished, what it produced, and what was non-finite, truncated, empty or dropped."""
    rows = []
    for name, state in (manifest.get("passes") or {}).items():
        counts, promise = state.get("counts") or {}, state.get("deterministic") or {}
        promised = promise.get("promised")
        word = NONE if promised is None else "promised" if promised else "not promised"
        status = stacked(visible(state.get("status") or NONE), visible(state.get("why") or ""))
        determinism = stacked(word, visible(promise.get("why") or ""))
        rows.append((visible(name), status, *(count(counts.get(key)) for key in _COUNTS), determinism))
    header = ("pass", "status", "sequences", "tokens", "non-finite", "truncated", "empty", "dropped", "determinism")
    return Table(header, tuple(rows))


def nulls_table(summary: Mapping[str, Any]) -> Table:
    """Every engine against itself."""
    header = (
        "pass",
        "repeated as",
        "engine",
        "dtype",
        "tokens",
        "sequences",
        "diverged sequences",
        "mean |Δlogp|",
        "max |Δlogp|",
    )
    rows = [
        (
            *(visible(null.get(key) or NONE) for key in ("pass_id", "null_pass", "engine", "dtype")),
            *(count(null.get(key)) for key in ("n_tokens", "n_sequences", "n_diverged_sequences")),
            *(number(null.get(key)) for key in ("mean_abs_logprob_diff", "max_abs_logprob_diff")),
        )
        for null in summary.get("nulls") or []
    ]
    return Table(header, tuple(rows))


def provenance_table(manifest: Mapping[str, Any]) -> Table:
    """The manifest, flattened to dotted names."""
    return Table(("entry", "value"), tuple((visible(name), visible(value)) for name, value in _flat(manifest, "")))


def pair_rows(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]], float | None, int | None]]:
    """(label, metrics, null, tokens) of every compared pair."""
    modes = trainer_modes(summary)
    return [
        (visible(pair_label(pair, modes)), pair.get("metrics") or {}, null_of(pair), pair.get("n_tokens"))
        for pair in summary.get("pairs") or []
    ]


def stacked(*parts: str) -> str:
    """A cell of the parts that are not empty, what is secondary below what is not."""
    return "\n".join(part for part in parts if part)


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str):
        yield name, value
    else:
        yield name, NONE if value is None else json.dumps(value, ensure_ascii=False, default=str)
