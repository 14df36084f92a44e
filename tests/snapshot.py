"""Snapshots: the text of a page or a screen, kept in `tests/snapshots/`. `UPDATE_SNAPSHOTS=1` rewrites them."""

from __future__ import annotations

import os
import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from mismatch_probe.report.model import Report
from mismatch_probe.report.render.html import html_page
from mismatch_probe.report.render.markdown import markdown_page
from mismatch_probe.report.render.terminal import print_report

FOLDER = Path(__file__).parent / "snapshots"
_STYLE = re.compile(r"<style>.*?</style>|style-src &#39;sha256-[^&]*&#39;", re.DOTALL)


def screen(report: Report, width: int = 80) -> str:
    """What a terminal without colour shows."""
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def assert_snapshots(name: str, report: Report) -> None:
    """A report as the three renderers show it, without figures: `<name>.html`, `<name>.md`, `<name>.txt`."""
    assert_snapshot(f"{name}.html", _STYLE.sub("", html_page(report, {})))
    assert_snapshot(f"{name}.md", markdown_page(report, {}))
    assert_snapshot(f"{name}.txt", screen(report))


def assert_snapshot(name: str, text: str) -> None:
    """`text` is what `tests/snapshots/<name>` holds."""
    path = FOLDER / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{name} has changed; UPDATE_SNAPSHOTS=1 rewrites it, then read it"
