"""What commands share when they print."""

from __future__ import annotations

import json
from typing import Any

import click


def printable(text: str) -> str:
    """The text without control characters: an engine's message can quote a model."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def print_json(document: Any) -> None:
    """One JSON document on stdout; nothing else goes there with `--json`."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
