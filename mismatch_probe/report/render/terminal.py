"""A report in a terminal: the answer, what to do next, the table in the columns that fit, the notes.

Control characters in names and text are spelled out. Colour is never the only bearer of a meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Table as Grid
from rich.text import Text as Line

from mismatch_probe.report.format import LEVELS, details, level, visible
from mismatch_probe.report.model import Code, Items, Table, Text, Tokens
from mismatch_probe.report.render.html import BADGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mismatch_probe.report.model import Block, Cell, Report, Section, Token, TokenSequence

_STYLES = {
    "plain": "",
    "strong": "bold",
    "dim": "dim",
    "note": "yellow",
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
    "inconclusive": "yellow",
    "none": "bold",
}
_LEVEL_COLORS = ("#ffe9b8", "#ffd073", "#ffb347", "#ff9331", "#ff7a3c")
_LEVEL_STYLES = ("", "", "", *(f"black on {color}" for color in _LEVEL_COLORS))
_BROKEN = "reverse strike"
_MARKED_FROM, _WORST = 5, 10
_GAP = 2  # padding and the line that the box leaves blank


def print_report(report: Report, console: Console) -> None:
    """Prints what a reader needs at once; the rest is in the report's page."""
    console.print(Line(visible(report.title), style="bold"))
    badge = BADGES[report.state]
    for index, text in enumerate(report.answer):
        line = Line(f"{badge}: " if badge and index == 0 else "", style=_STYLES[report.state])
        console.print(line.append(visible(text), style="bold" if index == 0 else "not bold default"))
    if report.steps:
        console.print()
    for step in report.steps:
        _say(console, f"Next: {step.text}")
        if step.command:
            console.print(Line(f"  {visible(step.command)}", style="cyan"), soft_wrap=True)
    for section in report.lead:
        _print_section(section, console)
    if report.table:
        console.print()
        print_table(report.table, console)
    if report.notes:
        console.print()
    for note in report.notes:
        _say(console, f"• {note.text}", note.tone)
    for section in report.sections:
        _print_section(section, console)


def _print_section(section: Section, console: Console) -> None:
    if section.depth == "screen":
        console.print()
        console.print(Line(visible(section.title), style="bold"))
        for block in section.blocks:
            print_block(block, console)


def print_block(block: Block, console: Console) -> None:
    """Prints one block; figures are left to the page."""
    match block:
        case Text(text, tone):
            _say(console, text, tone)
        case Items(items):
            for item in items:
                _say(console, f"• {item.text}", item.tone)
        case Table():
            print_table(block, console)
        case Code(text, title):
            _say(console, title, "dim")
            for line in text.split("\n"):
                console.print(Line(f"  {visible(line)}"), soft_wrap=True)
        case Tokens(sequences):
            for sequence in sequences:
                print_tokens(sequence, console)


def print_table(table: Table, console: Console) -> None:
    """Prints the columns that fit, each row on one line where that is possible, and names those that do not fit."""
    cells = [[_text(cell) for cell in row] for row in table.rows]
    widths = [
        max([cell_len(visible(column.title)), *(cell_len(row[index].plain) for row in cells)])
        for index, column in enumerate(table.columns)
    ]
    shown = fitting(widths, [column.rank for column in table.columns], console.width)
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index in shown:
        column = table.columns[index]
        grid.add_column(
            Line(visible(column.title)), justify="right" if column.numeric else "left", no_wrap=column.numeric
        )
    for row in cells:
        grid.add_row(*(row[index] for index in shown))
    console.print(grid)
    left_out = [visible(column.title) for index, column in enumerate(table.columns) if index not in shown]
    if left_out:
        console.print(Line(f"Not shown at this width: {', '.join(left_out)}.", style="dim"))
    if table.legend:
        console.print(Line(visible(table.legend), style="dim"))


def fitting(widths: Sequence[int], ranks: Sequence[int], width: int) -> list[int]:
    """The columns to show: those of the highest rank go first, of equal rank the one furthest to the right."""
    shown = list(range(len(widths)))
    while sum(widths[index] for index in shown) + _GAP * (len(shown) - 1) > width:
        droppable = [index for index in shown if ranks[index] > 0]
        if not droppable:
            break
        shown.remove(max(droppable, key=lambda index: (ranks[index], index)))
    return shown


def print_tokens(sequence: TokenSequence, console: Console) -> None:
    """Prints a sequence with its tokens coloured by |d|, then the numbers of the worst.

    Tokens of 0.1 nats and more stand in ⟦ ⟧, so that they show without colour, too.
    """
    console.print(Line(visible(sequence.title), style="bold"))
    line = Line()
    for token in sequence.tokens:
        size = level(token)
        text = visible(token.text)
        marked = f"⟦{text}⟧" if size >= _MARKED_FROM else text
        line.append(marked, style=_BROKEN if size >= len(_LEVEL_STYLES) else _LEVEL_STYLES[size])
        if "\n" in token.text:
            line.append("\n")
    console.print(line)
    legend = Line("|d| in nats:", style="dim")
    for name, style in zip(LEVELS[2:], _LEVEL_STYLES[3:], strict=True):
        legend.append(" ").append(name, style=style)
    console.print(legend.append(f"; ⟦ ⟧ {LEVELS[_MARKED_FROM - 1]}."))
    sizes = [(-_size(token), index) for index, token in enumerate(sequence.tokens)]
    for _, index in sorted(sizes)[:_WORST]:
        token = sequence.tokens[index]
        console.print(Line(f"  {index:>5}  “{visible(token.text)}”  {details(token)}"))


def _size(token: Token) -> float:
    size = abs(token.trainer_logprob - token.rollout_logprob)
    return size if size < float("inf") else float("inf")


def _text(cell: Cell) -> Line:
    text = Line(visible(cell.text), style=_STYLES[cell.tone])
    return text.append(f" {visible(cell.interval)}", style="not bold default") if cell.interval else text


def _say(console: Console, text: str, tone: str = "plain") -> None:
    if text:
        console.print(Line(visible(text), style=_STYLES[tone]))
