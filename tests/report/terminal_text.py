"""What every text for a terminal has to be."""

from __future__ import annotations

import re

from rich.cells import cell_len


def assert_fits(text: str, width: int) -> None:
    """No line is wider than the terminal, and no character controls it or the direction of text."""
    assert max(cell_len(line) for line in text.split("\n")) <= width
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    text.encode("utf-8")
