"""A report, whatever command it is of: blocks that the three renderers (HTML, Markdown, terminal) know how to show.

Text in here is raw: model text, file names and error messages go in as they are. The renderers make it visible and
escape it, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from mismatch_probe.report.format import NONE, count, interval, number, percent
from mismatch_probe.results.finding import Severity
from mismatch_probe.types import MetricValue

Tone = Literal["plain", "strong", "dim", "note", "ok", "warn", "fail"]
State = Literal["ok", "warn", "fail", "inconclusive", "none"]
STATES: dict[Severity, State] = {"info": "ok", "note": "inconclusive", "warn": "warn", "fail": "fail"}
"""The state of an answer by the severity of the finding that decides it."""
Depth = Literal["screen", "page", "detail"]
"""Where a section stands: `screen` everywhere, `page` folded in HTML and Markdown, `detail` folded in HTML alone."""


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: What it says.
        interval: `[low, high]` of a value; stands below the value on a page, beside it in a terminal.
        below: A reason or a detail; pages show it below, a terminal leaves it out.
        tone: Colour; never the only bearer of a meaning.
    """

    text: str
    interval: str = ""
    below: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Its header.
        numeric: Set to the right.
        rank: A terminal that is too narrow leaves out columns of the highest rank first; those of rank 0 stay.
    """

    title: str
    numeric: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; a row is named by its first cell. `legend` says how to read it."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    legend: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Items:
    """Short statements of equal rank, one to a line."""

    items: tuple[Text, ...]


@dataclass(frozen=True)
class Code:
    """A snippet that is to be copied as it stands. `title` names the file or the framework that it is for."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class FigureRef:
    """A registered figure, shown where it has been drawn. See `report.figures`."""

    name: str


@dataclass(frozen=True)
class Token:
    """A response token in a token view. Log-probs and entropy in nats; rank 0 is the likeliest token.

    Attributes:
        text: The token, decoded by itself.
        rollout_logprob: log μ.
        trainer_logprob: log π.
        entropy: Of the trainer's distribution, None where it was not recorded.
        rank: At the trainer, None where it was not recorded.
    """

    text: str
    rollout_logprob: float
    trainer_logprob: float
    entropy: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class TokenSequence:
    """A sequence in a token view: its name, e.g. `"worst of bfloat16: sequence 12, prompt math-3"`, and its tokens."""

    title: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Tokens:
    """Sequences with every token coloured by |d|."""

    sequences: tuple[TokenSequence, ...]


Block = Text | Items | Table | Code | FigureRef | Tokens


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        name: For an anchor, in kebab case.
        title: The heading.
        blocks: What stands there.
        depth: Where it stands.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]
    depth: Depth = "page"


@dataclass(frozen=True)
class Step:
    """What to do next. `command` is exact, empty where nothing is to be run."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Report:
    """A report in the order in which it is read.

    Attributes:
        title: What it is of, e.g. `"Rollout–trainer mismatch of smollm2-135m"`.
        state: Of the answer.
        answer: The answer, in one or two sentences.
        steps: What to do next.
        lead: What has to be known before the numbers.
        table: The numbers behind the answer, None where there are none.
        notes: What limits the numbers, what is missing, which limits are exceeded.
        sections: The rest.
    """

    title: str
    state: State
    answer: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    lead: tuple[Section, ...] = ()
    table: Table | None = None
    notes: tuple[Text, ...] = ()
    sections: tuple[Section, ...] = ()


def estimate(value: MetricValue | None, *, digits: int = 3, below: str = "", tone: Tone = "plain") -> Cell:
    """A value with its interval; the reason below where there is no value; `–` for None."""
    if value is None:
        return Cell(NONE, below=below, tone=tone)
    if value.value is None:
        return Cell(NONE, below=below or value.why, tone=tone)
    limits = interval(value.ci_low, value.ci_high, digits)
    return Cell(number(value.value, digits), limits, below, tone)


def in_line(value: MetricValue, digits: int = 3, unit: str = "") -> str:
    """The same inside a sentence: `4.35e-2 nats [4.02e-2, 4.64e-2]`."""
    text = f"{number(value.value, digits)}{unit and ' ' + unit}"
    return f"{text} {interval(value.ci_low, value.ci_high, digits)}".rstrip()


def plain(value: float | int | str | bool | None, *, digits: int = 3, below: str = "", tone: Tone = "plain") -> Cell:
    """A cell of a number without interval, of a count, of a yes or no, or of a text; `–` for None."""
    match value:
        case bool():
            text = "yes" if value else "no"
        case int():
            text = count(value)
        case float():
            text = number(value, digits)
        case None:
            text = NONE
        case _:
            text = value
    return Cell(text, below=below, tone=tone)


def fraction(value: float | None, *, below: str = "", tone: Tone = "plain") -> Cell:
    """A cell of a fraction as a percentage."""
    return Cell(percent(value), below=below, tone=tone)


def json_text(value: JsonValue) -> str:
    """A JSON value as a cell shows it: a text as it is, `–` for None."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flattened(content: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested JSON as a text, under its dotted name; an empty mapping is a value."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json_text(value)


def columns(*header: str | Column) -> tuple[Column, ...]:
    """Columns; a string is a text column of rank 0."""
    return tuple(name if isinstance(name, Column) else Column(name) for name in header)


def numeric(*titles: str) -> tuple[Column, ...]:
    """Columns of numbers, of rank 0."""
    return tuple(Column(title, numeric=True) for title in titles)


def row(*cells: Cell | str) -> tuple[Cell, ...]:
    """A row; a string is a plain cell."""
    return tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells)


def table(header: Sequence[str | Column], rows: Sequence[Sequence[Cell | str]], legend: str = "") -> Table:
    """A table of `columns` and `row`s."""
    return Table(columns(*header), tuple(row(*cells) for cells in rows), legend)


def section(name: str, title: str, *blocks: Block | None, depth: Depth = "page") -> tuple[Section, ...]:
    """A section of the blocks that say anything: none where there is neither a row, an item, a figure nor a snippet."""
    kept = tuple(block for block in blocks if block is not None and not _empty(block))
    says = any(not isinstance(block, Text) for block in kept)
    return (Section(name, title, kept, depth),) if says else ()


def _empty(block: Block) -> bool:
    match block:
        case Table():
            return not block.rows
        case Items():
            return not block.items
        case Tokens():
            return not block.sequences
        case _:
            return False
