"""An audit as one HTML file, under the same policy as every report: the verdict first, then what it rests on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch_probe.report.audit_range import CONTENTS, Block, value_cell
from mismatch_probe.report.audit_terminal import (
    STATUSES,
    answer,
    by_status,
    counts,
    deciding_pairs,
    precision_rows,
    question,
)
from mismatch_probe.report.format import NONE, count, interval, number, percent, visible
from mismatch_probe.report.html import EmbeddedFigure, embedded, render_page
from mismatch_probe.report.names import precision_label
from mismatch_probe.report.view import Table, provenance_table, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Document = Mapping[str, Any]

GUIDES: dict[str, tuple[str, str]] = {
    "range": (
        "Activations against FP16's largest number",
        "A line in the shaded region has no FP16 number; what lies right of the vertical line was never seen.",
    ),
    "gradients": (
        "Gradients against what FP16 keeps",
        "Σ|g| left of a bar becomes 0, and a gradient right of it infinite; a loss scale moves the bar to the left.",
    ),
    "lag": (
        "What the engine does not see of a step",
        "Left, how small a step is beside the distance of the engine's numbers (a larger move counts as one); "
        "right, what the difference between FP32 masters and their 16-bit copy does to log-probs, with 95 % intervals.",
    ),
}
"""Title and one-sentence reading guide of each figure."""
_STATES = {"pass": "within", "warn": "not-judged", "fail": "exceeded", "not judged": "not-judged"}
_CHECK_HEADER = ("status", "check", "value", "threshold", "evidence")


@dataclass(frozen=True)
class Part:
    """A section of the page: sentences, then figures, then tables, of which any may be absent."""

    name: str
    title: str
    texts: tuple[str, ...]
    blocks: tuple[Block, ...] = ()
    figures: tuple[EmbeddedFigure, ...] = ()


def render_audit(document: Document, figures: Mapping[str, Path]) -> str:
    """A self-contained page.

    Args:
        document: Content of `audit.json`; names and sentences in it may be hostile.
        figures: PNG files by the names of `GUIDES`; those that are absent are left out.

    Raises:
        OSError: A figure cannot be read.
    """
    deciding = deciding_pairs(document)
    recommendation = document["recommendation"]
    baseline = document["baseline"]
    return render_page(
        "audit.html.j2",
        question=question(document),
        answer=answer(document),
        state=_STATES[document["verdict"]],
        precisions=[(_STATES[status], status, text) for status, text in precision_rows(document)],
        reasons=_reasons(deciding),
        profile=f"{visible(document['profile']['name'])}. {visible(document['profile']['description'])}",
        worse=0 if baseline is None else len(baseline["regressions"]),
        pairs=Part("pairs", "Precision pairs", (), (Block("", _pairs(document["pairs"]), open=True),)),
        recommendation=None if recommendation is None else _recommendation(recommendation),
        snippets=[] if recommendation is None else [_snippet(found) for found in recommendation["snippets"]],
        parts=[
            _deciding(deciding),
            _others([pair for pair in document["pairs"] if pair not in deciding]),
            *_measured(document, figures),
            *([] if baseline is None else [_baseline(baseline)]),
        ],
        missing=[(visible(row["what"]), visible(row["why"])) for row in document["missing"]],
        provenance=provenance_table({key: document[key] for key in ("profile", "options")} | document["provenance"]),
    )


def _reasons(pairs: Sequence[Document]) -> list[tuple[str, str, str, str]]:
    """(state, status, check, evidence) of the pairs' checks that are not passed."""
    return [
        (
            _STATES[check["status"]],
            check["status"],
            visible(check["name"])
            if len(pairs) == 1
            else f"{visible(precision_label(pair))}: {visible(check['name'])}",
            visible(check["evidence"]),
        )
        for pair in pairs
        for check in by_status(pair["checks"])
        if check["status"] != "pass"
    ]


def _pairs(pairs: Sequence[Document]) -> Table:
    rows = []
    for pair in pairs:
        found, gap = counts(pair["checks"]), value_cell(pair["mean_abs_logprob_diff"])
        numbers = (str(found[status]) for status in STATUSES)
        tokens = f"{count(pair['n_tokens'])} of {count(pair['n_prompts'])} prompts"
        rows.append((visible(precision_label(pair)), pair["verdict"], gap, *numbers, tokens))
    return Table(("rollout → trainer", "verdict", "mean |d| (nats)", *STATUSES, "tokens"), tuple(rows))


def _recommendation(found: Document) -> Part:
    chosen = None if found["correction"] is None else found["correction"]["name"]
    rows = tuple(
        (
            stacked(visible(row["title"]), visible(row["name"]) + (", recommended" if row["name"] == chosen else "")),
            _bounds(row),
            stacked(
                percent(row["touched"]["value"]), _percents(row["touched"]), visible(row["touched"].get("why", ""))
            ),
        )
        for row in found["corrections"]
    )
    table = Table(("correction", "weight", "share of tokens touched"), rows)
    texts = tuple(visible(text) for text in found["sentences"])
    return Part("recommendation", "Recommendation", texts, (Block("Corrections", table),))


def _bounds(correction: Document) -> str:
    low, high = correction["low"], correction["high"]
    if not correction["masks"]:
        return f"capped at {high:g}"
    return f"masked outside [{low:g}, {high:g}]" if low else f"masked above {high:g}"


def _snippet(found: Document) -> tuple[str, str, str]:
    """(framework, note, text); the text keeps its line breaks, and nothing else that acts."""
    lines = "\n".join(visible(line) for line in found["text"].split("\n"))
    name = {"trl": "TRL", "vllm": "vLLM's command line"}.get(found["framework"], visible(found["framework"]))
    return name, visible(found["note"]), lines


def _check(check: Document) -> tuple[str, ...]:
    open_ = f"{check['best']} or {check['worst']}" if check["best"] != check["worst"] else ""
    return (
        stacked(check["status"], open_),
        stacked(visible(check["title"]), visible(check["name"])),
        value_cell(check),
        stacked(visible(check["threshold"]), visible(check["source"])),
        stacked(visible(check["evidence"]), visible(check["where"] or "")),
    )


def _deciding(pairs: Sequence[Document]) -> Part:
    text = (
        "A check is judged by its whole 95 % interval: where that lies on both sides of a threshold, or nothing was "
        "measured, it is not judged."
        if pairs
        else "No pair decides, so there is no check to show."
    )
    blocks = tuple(
        Block(
            visible(precision_label(pair)),
            Table(_CHECK_HEADER, tuple(_check(check) for check in by_status(pair["checks"]))),
            open=True,
        )
        for pair in pairs
    )
    return Part("checks", "Checks that decide", (text,), blocks)


def _others(pairs: Sequence[Document]) -> Part:
    rows = tuple(
        (visible(precision_label(pair)), *_check(check))
        for pair in pairs
        for check in by_status(pair["checks"])
        if check["status"] != "pass"
    )
    if not rows:
        return Part("others", "Other pairs", ("No other pair has a check that is not passed.",))
    text = f"Of {len(pairs)} other pairs, the checks that fail, warn or are not judged."
    return Part("others", "Other pairs", (text,), (Block("", Table(("pair", *_CHECK_HEADER), rows)),))


def _measured(document: Document, figures: Mapping[str, Path]) -> list[Part]:
    """What was measured on the model itself; a part that was not says so."""
    parts = []
    for key, (name, title, make) in CONTENTS.items():
        found = document["range"][key]
        texts, blocks = (("This was not measured.",), ()) if found is None else make(found)
        drawn = embedded(figures, {name: GUIDES[name]}) if found is not None and name in GUIDES else []
        parts.append(Part(name, title, texts, blocks, tuple(drawn)))
    return parts


def _baseline(found: Document) -> Part:
    """What differs in how the two audits were made, and what came of it."""
    worse = found["regressions"]
    text = (
        f"Compared with {visible(found['source'])} ({visible(found['model'])}): {len(worse) or 'none'} of "
        f"{len(found['checks'])} checks that both have {'is' if len(worse) == 1 else 'are'} worse. A value that moved "
        "by no more than its uncertainty is not worse."
    )
    gone = (f"No longer checked: {', '.join(visible(name) for name in found['gone'])}.",) if found["gone"] else ()
    changed = tuple((visible(r["what"]), _any(r["before"]), _any(r["after"])) for r in found["changed"])
    same = () if changed else ("Nothing is recorded to differ in how they were made.",)
    blocks = (
        Block("Regressions", _changes(worse), open=True),
        Block("What changed in how it was made", Table(("setting", "was", "is"), changed)),
        Block("All checks", _changes(found["checks"])),
    )
    return Part("baseline", "Against the baseline", (text, *gone, *same), tuple(b for b in blocks if b.table.rows))


def _changes(rows: Sequence[Document]) -> Table:
    cells = tuple(
        (
            stacked(visible(row["name"]), visible(precision_label(row))),
            stacked(number(row["before"]), row["status_before"]),
            stacked(number(row["after"]), row["status_after"]),
            _change(row["change"]),
            visible(row["why"]),
        )
        for row in sorted(rows, key=lambda row: not row["regressed"])
    )
    return Table(("check", "before", "after", "change", "why"), cells)


def _change(change: Document | None) -> str:
    if change is None:
        return NONE
    sign = "×" if change["kind"] == "ratio" else "+" if change["value"] > 0 else ""
    return stacked(f"{sign}{number(change['value'])}", interval(change["ci_low"], change["ci_high"]))


def _percents(value: Document) -> str:
    if value["ci_low"] is None or value["ci_high"] is None:
        return ""
    return f"[{percent(value['ci_low'])}, {percent(value['ci_high'])}]"


def _any(value: Any) -> str:
    if value is None:
        return NONE
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
