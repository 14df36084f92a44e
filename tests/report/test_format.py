from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.report.format import clipped, count, estimate, interval, number, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (-0.0, "0"),
        (0.0418, "4.18e-2"),
        (-0.0418, "-4.18e-2"),
        (0.983, "0.983"),
        (1, "1.00"),
        (12.44, "12.4"),
        (999.4, "999"),
        (999.6, "1.00e3"),
        (0.09996, "0.100"),
        (0.09994, "9.99e-2"),
        (4.5e-11, "4.50e-11"),
        (float("nan"), "NaN"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
    ],
)
def test_number_has_three_digits_in_one_style(value: float | None, text: str) -> None:
    assert number(value) == text


def test_number_with_fewer_digits() -> None:
    assert number(1.24e-4, 2) == "1.2e-4"
    assert number(123.4, 2) == "120" or number(123.4, 2) == "123"


def test_an_interval_needs_both_limits() -> None:
    assert interval(0.037, 0.044) == "[3.70e-2, 4.40e-2]"
    assert interval(None, 0.044) == interval(0.037, None) == ""
    assert estimate(0.04, None, None) == "4.00e-2"
    assert estimate(0.04, 0.037, 0.044) == "4.00e-2 [3.70e-2, 4.40e-2]"


def test_count() -> None:
    assert count(13_521) == "13,521"
    assert count(0) == "0"
    assert count(None) == "–"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a↵b⇥c"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\x00\x9b", "⟨U+0000⟩⟨U+009B⟩"),
        ("\u200b\ufeff", "⟨U+200B⟩⟨U+FEFF⟩"),
        ("naïve 数学 ²", "naïve 数学 ²"),
    ],
)
def test_visible_spells_out_what_acts(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(alphabet=st.characters()))
def test_visible_text_is_inert(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert visible(shown) == shown
    shown.encode("utf-8")


def test_clipped_keeps_the_asked_end() -> None:
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("abcdef", 4) == "abc…"
    assert clipped("abcdef", 4, keep_end=True) == "…def"
