"""The report of `explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.report.format import NONE, clipped, count, digits_of, metric_title
from mismatch_probe.report.model import (
    Cell,
    Code,
    Column,
    Depth,
    Items,
    Report,
    Section,
    Step,
    Text,
    Tone,
    plain,
    section,
    table,
)
from mismatch_probe.report.words import all_words, say
from mismatch_probe.report.words.explain import logged, step
from mismatch_probe.report.words.logged import BLIND, TRAITS
from mismatch_probe.results.explanation import Derived, Explanation, NextDump, Series
from mismatch_probe.results.finding import Finding, Severity

_TONES: dict[Severity, Tone] = {"fail": "fail", "warn": "warn", "note": "note", "info": "plain"}
_NAME = 44
_UNKNOWN = 12
_MOST_NOTES = 12
_NAMED = 3
_TOGETHER = frozenset(
    {"log-not-same-tokens", "log-mean-above-maximum", "log-ratio-not-1", "log-ratio-fits-1", "log-negative-k1"}
    | {"log-capped", "log-pearson-low", "log-heavy-tail", "log-tail", "log-sequence-effect"}
)
_TRL = """import torch
from trl import GRPOTrainer

class DumpingGRPOTrainer(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        torch.save(out, f"DIR/step_{self.state.global_step}_rank_{self.accelerator.process_index}.pt")
        return out"""
"""Writes what TRL's reader of dumps takes."""


def explain_report(document: Explanation) -> Report:
    """What the metrics are, how large, how they go, what fits together, and what would say more."""
    mismatch = [one for one in document.series if one.is_mismatch]
    layout = Layout(any(one.n > 1 for one in mismatch), len({one.run for one in mismatch}) > 1)
    rows = [*(layout.series(one) for one in mismatch), *(layout.derived(one) for one in document.derived)]
    return Report(
        title=f"Metrics of {', '.join(document.frameworks)} in {clipped(document.source, 200, keep_end=True)}",
        state="warn" if document.of("warn") else "none",
        answer=_answer(document, mismatch),
        steps=tuple(_steps(document.dumps)),
        table=table(layout.columns(), rows, _legend(document)),
        notes=tuple(_notes(document)),
        sections=(
            *section("together", "What fits together", _items(document, _together), depth="screen"),
            *section("differ", "How these metrics are defined", _items(document, TRAITS.__contains__), depth="screen"),
            *_limits(mismatch),
            *section("blind", "What these numbers cannot tell", _items(document, BLIND.__contains__), depth="screen"),
            *_dumps(document.dumps),
            *_context(document),
            *_unknown(document),
        ),
    )


def _answer(document: Explanation, mismatch: Sequence[Series]) -> tuple[str, ...]:
    exceeded = list(dict.fromkeys(one.where for one in document.findings if one.code == "log-limit-exceeded"))
    at_last = " at the last step" if any(one.n > 1 for one in mismatch) else ""
    if exceeded:
        names = ", ".join(logged(name) for name in exceeded[:_NAMED])
        more = f" and {len(exceeded) - _NAMED} more" if len(exceeded) > _NAMED else ""
        verb = "exceeds a published limit" if len(exceeded) == 1 else "exceed published limits"
        return (f"{names}{more} {verb}{at_last}.", _extent(mismatch))
    if any(one.limits for one in mismatch):
        first = f"No published limit is exceeded{at_last}"
    else:
        first = "Nobody has published a limit for these metrics"
    return (f"{first}{'; there are warnings' if document.of('warn') else ''}.", _extent(mismatch))


def _extent(mismatch: Sequence[Series]) -> str:
    """How much was read."""
    what = f"{len(mismatch)} metric{'' if len(mismatch) == 1 else 's'} of the mismatch"
    points = [point for one in mismatch for point in (one.first, one.last) if point is not None]
    n = max((one.n for one in mismatch), default=0)
    if n <= 1:
        return f"{what}, one step."
    low, high = min(point.step for point in points), max(point.step for point in points)
    return f"{what}, {count(n)} steps from {step(low)} to {step(high)}."


def _steps(dumps: Sequence[NextDump]) -> Iterator[Step]:
    """What would settle the cause."""
    for one in dumps[:1]:
        yield Step(f"Write token log-probs of a few steps: they settle the cause. {one.switch}")
        yield Step("Compare what lies in DIR:", one.command)


@dataclass(frozen=True)
class Layout:
    """Which columns the table of metrics has.

    Attributes:
        many: Whether any metric has several steps.
        runs: Whether there are several runs.
    """

    many: bool
    runs: bool

    def columns(self) -> list[str | Column]:
        """Its header."""
        return [
            "metric",
            *([Column("run", rank=1)] if self.runs else []),
            Column("logged as", rank=3),
            Column("last" if self.many else "value", numeric=True),
            *(
                [
                    Column("median", numeric=True, rank=4),
                    Column("largest", numeric=True, rank=2),
                    Column("at step", numeric=True, rank=5),
                    Column("per 100 steps", numeric=True, rank=6),
                ]
                if self.many
                else []
            ),
            Column("limit", rank=1),
        ]

    def series(self, one: Series) -> list[Cell | str]:
        """A logged metric."""
        top = one.largest
        return [
            _title(one.key, one.formula),
            *([clipped(one.run, _NAME)] if self.runs else []),
            clipped(one.name, _NAME),
            _value(None if one.last is None else one.last.value),
            *(
                [
                    _value(one.median),
                    _value(None if top is None else top.value),
                    plain(None if top is None else step(top.step)),
                    _value(None if one.trend is None else one.trend.per_100.value),
                ]
                if self.many
                else []
            ),
            _limit(one),
        ]

    def derived(self, one: Derived) -> list[Cell | str]:
        """A metric that follows from logged ones."""
        over_steps = [_value(one.median), plain(None), plain(None), plain(None)] if self.many else []
        runs = [clipped(one.run, _NAME)] if self.runs else []
        return [
            _title(one.key, "", "= "), *runs, one.formula, _value(one.last.value), *over_steps, plain(None)
        ]  # fmt: skip


def _title(key: str, formula: str, before: str = "") -> Cell:
    """A metric's key, on pages with its title; the formula of one that the catalogue does not have."""
    return Cell(f"{before}{key or formula}", below=metric_title(key) if key in CATALOG else "")


def _value(value: float | None) -> Cell:
    return plain(value, digits=digits_of(value))


def _limit(one: Series) -> Cell:
    """The furthest limit that the last value is beyond, else the nearest that it keeps."""
    beyond = one.furthest(last=True)
    limit = beyond or next(iter(one.limits), None)
    if limit is None:
        return plain(None)
    word = "" if beyond else "not "
    who = limit.who.split(",")[0]
    return plain(f"{word}{limit.side} {limit.bound:g} ({who})", tone="warn" if beyond else "plain")


def _legend(document: Explanation) -> str:
    parts = ["d = log π − log μ (trainer − rollout), ρ = exp d, D = Σ d over a sequence."]
    if any("w" in one.formula.split() for one in document.series):
        parts.append("w: the framework's importance weight.")
    if any(one.trend for one in document.series):
        parts.append("Per 100 steps: Theil–Sen slope.")
    if document.derived:
        parts.append("= marks what follows from logged metrics of the same steps.")
    return " ".join(parts)


def _notes(document: Explanation) -> Iterator[Text]:
    if document.audit is not None:
        used = document.audit
        others = [one for one in used.pairs if one != used.pair]
        choice = f" Choose another pair with --pair: {', '.join(others)}." if others else ""
        yield Text(f"Audit {clipped(used.source, 80, keep_end=True)} of {used.model}, pair {used.pair}.{choice}")
        if not used.predictions:
            yield Text("The audit has none of these metrics.", "note")
    told = [one for one in document.findings if one.code not in TRAITS | BLIND and not _together(one.code)]
    for one in told[:_MOST_NOTES]:
        yield Text(_said(one), _TONES[one.severity])
    if len(told) > _MOST_NOTES:
        yield Text(f"{count(len(told) - _MOST_NOTES)} more findings are in the output of --json.")


def _together(code: str) -> bool:
    return code in _TOGETHER


def _items(document: Explanation, wanted: Callable[[str], bool]) -> Items:
    found = [one for one in document.findings if wanted(one.code)]
    return Items(tuple(Text(_said(one), _TONES[one.severity] if _together(one.code) else "plain") for one in found))


def _said(finding: Finding) -> str:
    """A finding with what to do about it."""
    fix = all_words()[finding.code].fix if finding.severity != "info" else ""
    return f"{say(finding)} {fix}".rstrip()


def _limits(mismatch: Sequence[Series]) -> tuple[Section, ...]:
    rows = [
        (
            plain(metric_title(one.key)),
            plain(limit.text),
            plain(limit.who),
            plain(f"{limit.side} {limit.bound:g}"),
            plain(f"{count(limit.n_beyond)} of {count(one.n)}", tone="warn" if limit.last_beyond else "plain"),
            plain(None if limit.first_beyond is None else step(limit.first_beyond)),
        )
        for one in mismatch
        for limit in one.limits
    ]
    header: list[str | Column] = [
        "metric",
        "published limit",
        "who",
        "beyond",
        Column("steps beyond", True),
        Column("first", True),
    ]
    return section("limits", "Published limits", table(header, rows), depth="page")


def _dumps(dumps: Sequence[NextDump]) -> Iterator[Section]:
    """What each framework has to write; on a screen what does not fit the next steps."""
    for place, one in enumerate(dumps):
        pickles = "; pickles, which --trust-pickle lets be read" if one.pickles else ""
        holds = f"The reader is for {one.written_for}; log-probs: {one.sides}{pickles}."
        blocks = (
            Text(f"{one.switch} {holds}" if place else holds),
            Code(_TRL, "For example:") if one.framework == "TRL" else None,
            Code(one.command, "Then:") if place else None,
        )
        depth: Depth = "screen" if place or one.framework == "TRL" else "page"
        yield from section(f"dump-{one.framework.lower()}", f"Token log-probs of {one.framework}", *blocks, depth=depth)


def _context(document: Explanation) -> tuple[Section, ...]:
    rows = [
        (one.name, one.context, _value(one.last.value), _value(one.median))
        for one in document.series
        if not one.is_mismatch and one.last is not None
    ]
    header: list[str | Column] = ["logged as", "what", Column("last", numeric=True), Column("median", numeric=True)]
    return section("context", "Beside them", table(header, rows), depth="page")


def _unknown(document: Explanation) -> tuple[Section, ...]:
    near = [one for one in document.unknown if one.nearest]
    shown = (*near, *(one for one in document.unknown if not one.nearest))[:_UNKNOWN]
    rows = [(clipped(one.name, 60), plain(one.n), ", ".join(one.nearest) or NONE) for one in shown]
    are = "1 name is" if document.n_unknown == 1 else f"{count(document.n_unknown)} names are"
    legend = f"{are} not known as a metric of the mismatch."
    header: list[str | Column] = ["name", Column("values", numeric=True), "similar known names"]
    return section(
        "unknown", "Names that are not known", table(header, rows, legend), depth="screen" if near else "page"
    )
