"""What commands share when they print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from pathlib import Path

    from mismatch_probe.report.model import Report
    from mismatch_probe.results.base import Document


class Finished(Protocol):
    """What a command has to show."""

    @property
    def path(self) -> Path: ...
    @property
    def document(self) -> Document: ...
    @property
    def exit_code(self) -> int: ...
    def report(self) -> Report: ...


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


def show_result(result: Finished, as_json: bool) -> int:
    """Prints a report, or with `--json` the document and its folder; returns the exit code."""
    if as_json:
        print_json({"path": str(result.path), **result.document.content()})
    else:
        show_report(result.report(), result.path)
    return result.exit_code
