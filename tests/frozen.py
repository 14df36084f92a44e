"""Frozen runs: tables and documents of real engines, cut to what is small, that must give the same numbers for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FROZEN = Path(__file__).parent / "frozen"


def assert_equal(found: Any, frozen: Any, where: str = "") -> None:
    """JSON values are equal, numbers to 1e-12: processors differ in last digits."""
    if isinstance(frozen, dict):
        assert found.keys() == frozen.keys(), where
        for key, value in frozen.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(frozen, list):
        assert len(found) == len(frozen), where
        for index, value in enumerate(frozen):
            assert_equal(found[index], value, f"{where}[{index}]")
    else:
        expected = pytest.approx(frozen, rel=1e-12, abs=1e-12) if isinstance(frozen, float) else frozen
        assert found == expected, where
