"""A report as Markdown (GitHub's flavour), with figures beside it; what is detail is left to the HTML page."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote

from mismatch_probe.report.figures import captions
from mismatch_probe.report.format import visible
from mismatch_probe.report.model import Code, FigureRef, Items, Table, Text, Tokens
from mismatch_probe.report.render.html import BADGES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mismatch_probe.report.figures import FigureInfo
    from mismatch_probe.report.model import Block, Cell, Report, Section

_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_ACTIVE = re.compile(r"[\\`*_{}\[\]#|~$@!]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_FENCE = "~~~~"


def markdown_page(report: Report, figures: Mapping[str, str | PurePath]) -> str:
    """A Markdown document.

    Args:
        report: What to show; any text in it may be hostile.
        figures: Name of each drawn figure to its path, relative to the document; absent ones are left out.
    """
    known = {name: (info, figures[name]) for name, info in captions(figures).items()}
    badge = BADGES[report.state]
    blocks = [f"# {escape(report.title)}"]
    first, *others = (escape(text) for text in report.answer)
    blocks += [f"**{badge}: {first}**" if badge else f"**{first}**", *others]
    for step in report.steps:
        blocks.append(escape(step.text))
        blocks += [_code(step.command)] if step.command else []
    for section in report.lead:
        blocks += _section(section, known)
    blocks += [_table(report.table)] if report.table else []
    blocks.append(_bullets(note.text for note in report.notes))
    for section in report.sections:
        blocks += _section(section, known)
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it stands: no HTML, emphasis, code, link, mention, maths, table border."""
    return _ACTIVE.sub(r"\\\g<0>", visible(text).translate(_HTML))


def _section(section: Section, figures: Mapping[str, tuple[FigureInfo, str | PurePath]]) -> list[str]:
    shown = [text for block in section.blocks if (text := _block(block, figures))]
    if section.depth == "detail" or not shown:
        return []
    if section.depth == "screen":
        return [f"## {escape(section.title)}", *shown]
    return ["<details>", f"<summary>{escape(section.title)}</summary>", *shown, "</details>"]


def _block(block: Block, figures: Mapping[str, tuple[FigureInfo, str | PurePath]]) -> str:
    match block:
        case Text(text, tone):
            return f"**{escape(text)}**" if tone == "strong" else escape(text)
        case Items(items):
            return _bullets(item.text for item in items)
        case Table():
            return _table(block)
        case Code(text, title):
            return "\n\n".join(part for part in (escape(title), _code(text)) if part)
        case FigureRef(name):
            return _figure(*figures[name]) if name in figures else ""
        case Tokens():
            return ""


def _figure(info: FigureInfo, path: str | PurePath) -> str:
    return f"![{escape(info.alt)}]({quote(PurePath(path).as_posix())})\n\n{escape(f'{info.title}. {info.guide}')}"


def _code(text: str) -> str:
    """A fenced block; a line that could end it is indented out of reach."""
    lines = (visible(line) for line in text.split("\n"))
    return "\n".join([_FENCE, *(f"    {line}" if line.lstrip().startswith("~~~") else line for line in lines), _FENCE])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _table(table: Table) -> str:
    lines = ["| " + " | ".join(escape(column.title) for column in table.columns) + " |"]
    lines.append("|" + "".join(" ---: |" if column.numeric else " --- |" for column in table.columns))
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + (f"\n\n{escape(table.legend)}" if table.legend else "")


def _cell(cell: Cell) -> str:
    return "<br>".join(escape(part) for part in (cell.text, cell.interval, cell.below) if part)
