"""Frozen runs: tables and documents of real engines, cut to what is small, that must give the same numbers for ever."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.results.base import Document

FROZEN = Path(__file__).parent / "frozen"


def assert_frozen(document: Document, path: Path, *, absolute: float = 1e-15) -> None:
    """Fails with the first value of `document` that is not the one in the JSON file `path`, which may be a `.gz`.

    The release that wrote the file does not count.
    """
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert_equal({**document.content(), "tool_version": ""}, json.loads(text) | {"tool_version": ""}, absolute=absolute)


def assert_equal(found: Any, frozen: Any, where: str = "", *, absolute: float = 1e-12) -> None:
    """JSON values are equal, numbers to 1e-12 of their size, or to `absolute`: processors differ in last digits."""
    if isinstance(frozen, dict):
        assert found.keys() == frozen.keys(), where
        for key, value in frozen.items():
            assert_equal(found[key], value, f"{where}.{key}", absolute=absolute)
    elif isinstance(frozen, list):
        assert len(found) == len(frozen), where
        for index, value in enumerate(frozen):
            assert_equal(found[index], value, f"{where}[{index}]", absolute=absolute)
    else:
        expected = pytest.approx(frozen, rel=1e-12, abs=absolute) if isinstance(frozen, float) else frozen
        assert found == expected, where
