"""Words of findings: each code is turned into a sentence in one place, and is documented there.

A module of this package registers the codes of one command. `say` finds the words of a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mismatch_probe.registered import Registry
from mismatch_probe.results.finding import Finding

Say = Callable[[Finding], str]


@dataclass(frozen=True)
class Words:
    """A code's entry in the list of findings.

    Attributes:
        code: The code.
        meaning: What it states, in one sentence, for the list.
        values: Name of each value, with its meaning and unit.
        fix: What to do about it; empty for a plain result.
        say: Finding to sentence. The text may quote a model or a file: renderers escape it.
    """

    code: str
    meaning: str
    values: Mapping[str, str]
    fix: str
    say: Say


_REGISTRY = Registry[Words](__name__, "finding")


def words(code: str, meaning: str, values: Mapping[str, str] | None = None, fix: str = "") -> Callable[[Say], Say]:
    """Registers the words of a code.

    Raises:
        ValueError: The code has words.
    """

    def register(say: Say) -> Say:
        _REGISTRY.add(code, Words(code, meaning, values or {}, fix, say))
        return say

    return register


def all_words() -> dict[str, Words]:
    """Every code with its words, sorted by code."""
    return _REGISTRY.sorted()


def say(finding: Finding) -> str:
    """The sentence of a finding.

    Raises:
        KeyError: Nobody has registered its code.
    """
    known = _REGISTRY.known if finding.code in _REGISTRY.known else all_words()
    return known[finding.code].say(finding)
