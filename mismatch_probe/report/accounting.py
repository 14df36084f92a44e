"""What of a recorded dump cannot be log-probs or does not line up; stands before every mean."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.report.format import NONE, count, percent
from mismatch_probe.report.model import Cell, Column, Depth, Items, Section, Text, Tone, numeric, row, section, table
from mismatch_probe.report.words import all_words, say
from mismatch_probe.results.finding import Finding, Severity

_TONES: dict[Severity, Tone] = {"fail": "fail", "warn": "warn", "note": "note", "info": "dim"}
_TITLES = {
    "mismatched-lengths": "length of {key}",
    "ids-out-of-range": "ids out of range",
    "equal-sides": "equal sides",
    "placeholder-logprobs": "{value} for a log-prob",
    "constant-run": "runs of {value}",
    "positive-logprobs": "above 0",
    "unsampled-tokens": "not sampled",
    "coarse-grid": "coarse grid",
    "duplicated-sequences": "copies",
    "zeros-at-one-end": "0 at the {end} token",
    "masked-all": "all masked",
    "empty-responses": "no response",
    "empty-prompts": "no prompt",
}
_LEGEND = (
    "n counts tokens that the loss mask keeps; for lengths, copies and empty rows it counts rows, for ids it counts "
    "ids. Places are file:row[index of the response token]. Nothing is replaced: tokens whose value is not a log-prob "
    "are left out of every mean, and mean |d| is given with and without them."
)


def accounting_section(findings: Sequence[Finding], depth: Depth = "screen") -> tuple[Section, ...]:
    """The findings of `ingest.accounting` in their order: a table with first places, then what each says and its fix.

    There is no section where there are none.
    """
    shown = [finding for finding in findings if finding.code in _TITLES]
    header: tuple[str | Column, ...] = ("finding", "side", *numeric("n", "share"), Column("first place", rank=1))
    told = Items(tuple(_told(finding) for finding in shown))
    title = "What is not a log-prob or does not line up"
    return section("accounting", title, table(header, [_row(one) for one in shown], _LEGEND), told, depth=depth)


def _row(finding: Finding) -> tuple[Cell, ...]:
    named = {name: finding.text(name) for name in ("key", "value", "end")}
    share = finding.maybe("share" if "share" in finding.values else "share_of_rows")
    places = finding.names("places") if "places" in finding.values else ()
    return row(
        Cell(_TITLES[finding.code].format(**named), tone=_TONES[finding.severity]),
        finding.text("side") or NONE,
        count(finding.whole("n")),
        percent(share),
        Cell(places[0] if places else NONE, below=", ".join(places[1:])),
    )


def _told(finding: Finding) -> Text:
    return Text(f"{finding.severity}: {say(finding)} {all_words()[finding.code].fix}", _TONES[finding.severity])
