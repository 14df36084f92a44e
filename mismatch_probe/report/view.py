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
    modes_of,
    pair_label,
    reading,
)
from mismatch_probe.report.names import catalog_order, metric_formula, metric_title
from mismatch_probe.report.words import say
from mismatch_probe.results.comparison import LimitVerdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mismatch_probe.report.data import ReportData, WorstToken
    from mismatch_probe.report.matrix import Cell
    from mismatch_probe.results.comparison import Comparison, LimitCheck, Pair
    from mismatch_probe.results.manifest import Manifest

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

State = LimitVerdict


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
    contribution: str


def model_name(data: ReportData) -> str:
    """The model's name."""
    return visible(data.summary.model)


def findings(data: ReportData) -> list[str]:
    """What was found, in sentences."""
    return [visible(say(finding)) for finding in data.summary.findings if finding.severity != "note"]


def notes(data: ReportData) -> list[str]:
    """What limits the numbers, in sentences."""
    return [visible(say(finding)) for finding in data.summary.findings if finding.severity == "note"]


def limit_lines(summary: Comparison) -> list[LimitLine]:
    """Every limit with its verdict and measured value, failures first."""
    order: tuple[State, ...] = ("fail", "inconclusive", "ok")
    lines = [_limit_line(limit) for limit in summary.limits]
    return sorted(lines, key=lambda line: order.index(line.state))


def _limit_line(limit: LimitCheck) -> LimitLine:
    at = "" if "@" in limit.limit else f" at {limit.rollout_dtype}/{limit.trainer_dtype}"
    reason = f" ({visible(limit.why)})" if limit.why else ""
    return LimitLine(limit.verdict, f"{visible(limit.limit + at)}: measured {number(limit.value)}{reason}")


def verdict(summary: Comparison) -> tuple[State | Literal["none"], str]:
    """The overall state and one sentence about all limits."""
    states = [line.state for line in limit_lines(summary)]
    if not states:
        return "none", "No limits were set; --fail-on sets them."
    parts = [f"{states.count(state)} {state}" for state in ("fail", "inconclusive", "ok") if state in states]
    return states[0], f"Limits: {', '.join(parts)}."


def missing_lines(summary: Comparison) -> list[tuple[str, str]]:
    """(pair, why) of every pair that could not be compared."""
    modes = modes_of(summary)
    return [(visible(pair_label(pair, modes)), visible(pair.why)) for pair in summary.missing]


def matrix_table(summary: Comparison) -> Table:
    """Mean |Δlogp| of every pair, with interval and self-noise below the value."""
    matrix = metric_matrix(summary)
    rows = [
        (visible(row), *(_matrix_cell(matrix.cell(row, column)) for column in matrix.columns)) for row in matrix.rows
    ]
    return Table(("rollout μ ↓  trainer π →", *(visible(column) for column in matrix.columns)), tuple(rows))


def _matrix_cell(cell: Cell) -> str:
    noise = "" if cell.self_noise is None else f"self-noise {number(cell.self_noise, 2)}"
    return stacked(number(cell.value), interval(cell.ci_low, cell.ci_high), noise, visible(cell.why))


def metrics_table(summary: Comparison) -> Table:
    """All metrics of the diagonal pairs, a column each, and the formula."""
    pairs = diagonal_pairs(summary)
    keys = catalog_order(key for pair in pairs.values() for key in pair.metrics)
    rows = []
    for key in keys:
        values = [reading(pair.metrics, key) for pair in pairs.values()]
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
            contribution=percent(token.contribution),
        )
        for token in tokens
    ]


def passes_table(manifest: Manifest) -> Table:
    """Per pass: whether it finished, what it produced, and what was non-finite, truncated, empty or dropped."""
    rows = []
    for name, record in manifest.passes.items():
        promise, determinism = record.deterministic, NONE
        if promise is not None:
            determinism = stacked("promised" if promise.promised else "not promised", promise.why)
        status = stacked(record.status, visible(record.why))
        rows.append((visible(name), status, *(count(record.counts.get(key)) for key in _COUNTS), determinism))
    header = ("pass", "status", "sequences", "tokens", "non-finite", "truncated", "empty", "dropped", "determinism")
    return Table(header, tuple(rows))


def self_noise_table(summary: Comparison) -> Table:
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
            *(visible(noise.pass_id), visible(noise.self_noise_pass), noise.engine, noise.dtype),
            *map(count, (noise.measured.n_tokens, noise.measured.n_sequences, noise.measured.n_diverged_sequences)),
            *map(number, (noise.measured.mean_abs_logprob_diff, noise.measured.max_abs_logprob_diff)),
        )
        for noise in summary.self_noise
    ]
    return Table(header, tuple(rows))


def provenance_table(manifest: Mapping[str, Any]) -> Table:
    """A document's provenance, flattened to dotted names."""
    return Table(("entry", "value"), tuple((visible(name), visible(value)) for name, value in _flat(manifest, "")))


def pair_rows(summary: Comparison) -> list[tuple[str, Pair]]:
    """(label, pair) of every compared pair."""
    modes = modes_of(summary)
    return [(visible(pair_label(pair, modes)), pair) for pair in summary.pairs]


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
