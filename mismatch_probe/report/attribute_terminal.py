"""What an attribution says in a few lines: a nutshell, ranked causes, the ladder, and the settings that matter most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from mismatch_probe.report.attribute_words import (
    doubt,
    leaves_one_out,
    nutshell,
    share_percent,
    share_percents,
    unmeasured,
    warnings,
)
from mismatch_probe.report.format import interval, number, visible
from mismatch_probe.report.names import precision_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    Document = Mapping[str, Any]

# Settings that move the gap most, of each side.
_TOP = 3
_CAUSES = 8


def print_attribution(document: Document, console: Console) -> None:
    """Prints what a gap comes from; needs 80 columns. Control characters in names and text are spelled out."""
    title = f"Where the gap of {visible(document['model'])} comes from: {visible(precision_label(document))}"
    console.print(Text(title, style="bold"))
    console.print(_hanging([(Text("·"), Text(text)) for text in nutshell(document)]))
    for note in warnings(document):
        console.print(Text(f"Note: {note}", style="yellow"))
    if document["causes"]:
        _headline("Causes, with their share of E[d²] and what to do", console)
        console.print(_causes(document["causes"]))
    if document["ladder"]["rungs"]:
        _headline("Rung by rung, in this order", console)
        console.print(_ladder(document["ladder"]["rungs"]))
    elif document["ladder"]["why"]:
        console.print(Text(f"No ladder: {visible(document['ladder']['why'])}", style="yellow"))
    shown = _top(document["knobs"])
    if shown:
        _headline(f"Settings that move the gap most, {_TOP} of each side", console)
        console.print(_knobs(shown))
    _print_missing(document, console)


def _headline(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _hanging(rows: Sequence[tuple[Text, ...]]) -> Table:
    """Each row's last text beside the others, wrapped under itself."""
    lines = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(len(rows[0]) - 1 if rows else 0):
        lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for row in rows:
        lines.add_row(*row)
    return lines


def _causes(causes: Sequence[Document]) -> Table:
    rows = []
    for cause in causes[:_CAUSES]:
        share = Text("fault" if cause["kind"] == "fault" else share_percent(cause["share"]), justify="right")
        text = Text(visible(cause["text"]), style="bold")
        limits = share_percents(cause)
        text.append(f" {limits}" if limits else "", style="not bold dim")
        text.append(f"\n{visible(cause['action'])}", style="not bold")
        rows.append((Text(f"{cause['rank']}."), share, text))
    if len(causes) > _CAUSES:
        rows.append((Text(""), Text(""), Text(f"and {len(causes) - _CAUSES} more in the report", style="dim")))
    return _hanging(rows)


def _ladder(rungs: Sequence[Document]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rung")
    for name in ("share of E[d²]", "RMS (nats)"):
        table.add_column(Text(name), justify="right")  # brackets of a plain string would be markup
    for rung in rungs:
        share, rms = rung["share"], rung["rms"]
        limits = interval(rms["ci_low"], rms["ci_high"], digits=2)
        cells = (
            _estimate(share_percent(share["value"]), share_percents(share)),
            _estimate(number(rms["value"]), limits),
        )
        table.add_row(Text(visible(rung["change"])), *cells)
    return table


def _estimate(value: str, limits: str) -> Text:
    text = Text(value)
    text.append(f" {limits}" if limits else "", style="dim")
    return text


def _top(knobs: Sequence[Document]) -> list[Document]:
    """Of each side, the settings with the ratios that are furthest from 1, by intervals that leave 1 out."""

    def moves(row: Document) -> float:
        ratio = row["rms_ratio"]
        if not leaves_one_out(ratio):
            return 0.0
        return abs(math.log(ratio["value"])) if ratio["value"] else math.inf

    measured = [row for row in knobs if row["status"] == "measured" and moves(row)]
    found: list[Document] = []
    for side in ("rollout", "trainer"):
        own = sorted((row for row in measured if row["side"] == side), key=moves, reverse=True)[:_TOP]
        found += sorted(own, key=lambda row: row["rms_ratio"]["value"])
    return found


def _knobs(rows: Sequence[Document]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting")
    table.add_column("side", no_wrap=True)
    for title in ("RMS of the gap", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        ratio, time = row["rms_ratio"], row["time_ratio"]
        limits = interval(ratio["ci_low"], ratio["ci_high"])
        name = Text(visible(row["change"]))
        notes = "; ".join(text for text in (visible(row["note"]), doubt(row)) if text)
        name.append(f" ({notes})" if notes else "", style="yellow")
        cells = (Text(visible(row["side"])), _estimate(f"{number(ratio['value'])}×", limits))
        table.add_row(name, *cells, Text("–" if time is None else f"{number(time)}×"))
    return table


def _print_missing(document: Document, console: Console) -> None:
    console.print()
    left, knobs = unmeasured(document), document["knobs"]
    if left:
        failed = sum(row["status"] == "failed" for row in left)
        words = f", {failed} of which failed" if failed else ""
        text = (
            f"{len(left)} of {len(knobs)} settings were not measured{words}: report.html says why, under “Settings "
            "that were not measured”."
        )
        console.print(Text(text, style="yellow" if failed else "dim"))
    for name, row in document["layers"]["dtypes"].items():
        if not row["layers"]:
            console.print(Text(f"Layers in {visible(name)}: {visible(row['why'])}", style="yellow"))
    for what, row in (("Layers", document["layers"]), ("FP32 modules", document["fixes"])):
        if row["why"]:
            console.print(Text(f"{what}: {visible(row['why'])}", style="yellow"))
    if document["experts"] and document["experts"]["why"]:
        console.print(Text(f"Routers: {visible(document['experts']['why'])}", style="yellow"))
