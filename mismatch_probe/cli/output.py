"""What commands share when they print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

    from mismatch_probe.report.model import Report


def printable(text: str) -> str:
    """The text without control characters: an engine's message can quote a model."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def print_json(document: Any) -> None:
    """One JSON document on stdout; nothing else goes there with `--json`."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def show_report(report: Report, folder: Path) -> None:
    """Prints a report on the terminal, and where its page lies."""
    from rich.console import Console

    from mismatch_probe.report.render.terminal import print_report

    print_report(report, Console())
    click.echo(f"Report: {folder / 'report.html'}")
