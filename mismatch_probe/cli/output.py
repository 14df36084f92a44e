"""What commands share when they print."""

from __future__ import annotations

import json
from typing import Any

import click


def print_json(document: Any) -> None:
    """One JSON document on stdout; nothing else goes there with `--json`."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
