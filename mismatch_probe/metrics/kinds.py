"""What a token is made of, by its text: digits, letters, punctuation, white space, or something else."""

from __future__ import annotations

from functools import cache

# Codes of `token_kind` are indices into this.
KINDS = ("digit", "word", "punctuation", "space", "mixed", "special", "unknown")


@cache
def kind_of(text: str | None) -> int:
    """The code of a token that is not special. White space around something else does not count."""
    if text is None:
        return KINDS.index("unknown")
    core = text.strip()
    if not core:
        return KINDS.index("space" if text else "unknown")
    if all(character.isnumeric() for character in core):
        return KINDS.index("digit")
    if all(character.isalpha() or character in "'’" for character in core):
        return KINDS.index("word")
    if not any(character.isalnum() for character in core):
        return KINDS.index("punctuation")
    return KINDS.index("mixed")
