"""Holm's adjustment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.metrics.inference import holm


def test_known_family() -> None:
    """Holm 1979 by hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, then 1 · 0.04 raised to what came before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_missing_tests_are_no_part_of_the_family() -> None:
    assert holm([None, 0.02, None, 0.9]) == [None, pytest.approx(0.04), None, pytest.approx(0.9)]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_never_smaller_never_above_one_same_order(p_values: list[float]) -> None:
    adjusted = np.array(holm(p_values), dtype=float)
    assert (adjusted >= np.array(p_values)).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
