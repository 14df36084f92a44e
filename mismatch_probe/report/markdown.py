"""The report as Markdown (GitHub's flavour), with figures beside it."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote

from mismatch_probe.report import view, view_exact
from mismatch_probe.report.attribution import attribution_answer
from mismatch_probe.report.format import visible
from mismatch_probe.report.html import guides
from mismatch_probe.report.sections import sections

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mismatch_probe.report.data import ReportData
    from mismatch_probe.report.view import Table, WorstRow
    from mismatch_probe.results.comparison import Comparison

_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_ACTIVE = re.compile(r"[\\`*_{}\[\]#|~$@!]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def render_markdown(data: ReportData, figures: Mapping[str, str | PurePath]) -> str:
    """A Markdown document.

    Args:
        data: What to show; model text in it may be hostile.
        figures: Figure name (as registered) to its path relative to the document; absent ones
            are left out.
    """
    blocks = [f"# Rollout–trainer mismatch of {escape(view.model_name(data))}"]
    findings = [escape(text) for text in view.findings(data)]
    blocks += [f"**{text}**" for text in findings[: view.HEADLINES]] + findings[view.HEADLINES :]
    blocks.append(escape(view.verdict(data.summary)[1]))
    blocks.append(_bullets(f"{line.state}: {escape(line.text)}" for line in view.limit_lines(data.summary)))
    blocks.append(_bullets(f"note: {escape(note)}" for note in view.notes(data)))
    blocks += [
        "## Mean |Δlogp| of every pair",
        "Nats, with 95 % intervals over prompts; self-noise is the same engine against itself.",
    ]
    blocks.append(_table(view.matrix_table(data.summary), "No pair was compared."))
    blocks.append(
        _bullets(f"{escape(pair)} is missing: {escape(why)}" for pair, why in view.missing_lines(data.summary))
    )
    blocks += _exact_blocks(data.summary)
    if data.attribution is not None:
        blocks += ["## Where it comes from", *(escape(visible(text)) for text in attribution_answer(data.attribution))]
    for name, (title, guide) in guides().items():
        if name in figures:
            blocks += [f"## {title}", _image(title, figures[name]), escape(guide)]
    blocks += ["## Where the gap lies", _table(view_exact.where_table(data.summary), view_exact.TEXTS["no_where"])]
    for section in sections(data.summary):
        blocks += [f"## {section.title}", escape(section.text), _table(section.table, "")]
    blocks += ["## All metrics", _table(view.metrics_table(data.summary), "No pair of equal dtypes was compared.")]
    blocks += ["## Worst tokens", _worst(view.worst_rows(data.worst_tokens))]
    blocks += [
        "## What each pass produced, dropped and truncated",
        _table(view.passes_table(data.manifest), "No pass is recorded."),
    ]
    blocks += [
        "## Self-noise: each engine against itself",
        _table(view.self_noise_table(data.summary), "Self-noise was not measured."),
    ]
    blocks += [
        "## Provenance",
        _table(
            view.provenance_table(data.manifest.model_dump(mode="json", exclude_none=True)), "No manifest was given."
        ),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _exact_blocks(summary: Comparison) -> list[str]:
    """Exact divergences, what estimators of them cost, and the error budget."""
    texts = view_exact.TEXTS
    exact, estimators = view_exact.exact_table(summary), view_exact.estimators_table(summary)
    budget = view_exact.budget_table(summary)
    blocks = ["## Exact divergence"]
    blocks += [escape(texts["exact"]), _table(exact, "")] if exact.rows else [escape(texts["no_exact"])]
    if estimators.rows:
        blocks += ["### Estimators of KL(μ‖π)", escape(texts["estimators"]), _table(estimators, "")]
    blocks.append("## Error budget")
    if budget.rows:
        blocks += [escape(view_exact.budget_text(summary)), _table(budget, "")]
    else:
        blocks.append(escape(texts["no_budget"]))
    return blocks


def _image(title: str, path: str | PurePath) -> str:
    return f"![{title}]({quote(PurePath(path).as_posix())})"


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it stands: no HTML, emphasis, code, link, mention, maths, table border."""
    return _ACTIVE.sub(r"\\\g<0>", text.translate(_HTML))


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))


def _table(table: Table, empty: str) -> str:
    if not table.rows:
        return empty
    lines = ["| " + " | ".join(_cell(name) for name in table.header) + " |", "|" + " --- |" * len(table.header)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)


def _worst(rows: list[WorstRow]) -> str:
    if not rows:
        return "None recorded."
    header = ("pair", "d", "log μ", "log π", "share of Σd²", "where", "context", "token")
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        where = f"{row.prompt}, sequence {row.sequence}, position {row.position}, id {row.token_id}"
        cells = (
            row.pair,
            row.log_ratio,
            row.rollout_logprob,
            row.trainer_logprob,
            row.contribution,
            where,
            row.context,
            f"“{row.token}”",
        )
        lines.append("| " + " | ".join(escape(cell) for cell in cells) + " |")
    return "\n".join(lines)
