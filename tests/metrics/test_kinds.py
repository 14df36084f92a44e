"""What tokens are made of."""

from __future__ import annotations

import pytest

from mismatch_probe.metrics.curves import KINDS, kind_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("7", "digit"),
        (" 42", "digit"),
        ("½", "digit"),
        (" the", "word"),
        ("Größe", "word"),
        ("don't", "word"),
        ("语言", "word"),
        (".", "punctuation"),
        (" ```", "punctuation"),
        ("→", "punctuation"),
        ("\n\n", "space"),
        (" ", "space"),
        ("x2", "mixed"),
        ("'s.", "mixed"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_kinds(text: str | None, kind: str) -> None:
    assert KINDS[kind_of(text)] == kind
