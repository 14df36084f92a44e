"""A column in parts, in memory and in a scratch file: equal to what numpy says of the whole array, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mismatch_probe.errors import TableError
from mismatch_probe.metrics import column as columns
from mismatch_probe.metrics.column import Column, Scratch

# Neighbours that share their leading bits, ties, both zeros and infinities.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-52, -1.0, 1e-310, -1e-310, 1e308, np.inf, -np.inf]),
    st.floats(-10, 10, allow_nan=False),
    st.floats(allow_nan=False),
)
PARTS = st.lists(st.lists(VALUES, max_size=8), min_size=1, max_size=6).filter(any)


def filled(parts: list[list[float]], scratch: Scratch | None = None) -> tuple[Column, np.ndarray]:
    column = Column(scratch)
    for part in parts:
        column.append(np.array(part))
    return column, np.concatenate([np.array(part) for part in parts])


@pytest.fixture(params=[1, 3, 1 << 22])
def sorted_at_once(request: Any, monkeypatch: Any) -> None:
    """Values that are sorted at once: so few that they are looked for by their leading bits, and all."""
    monkeypatch.setattr(columns, "_SORTED", request.param)
    monkeypatch.setattr(columns, "_KEY_BITS", 14)  # few keys, so that they hold several values


@pytest.mark.usefixtures("sorted_at_once")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=PARTS, data=st.data(), absolute=st.booleans())
def test_order_statistics_are_those_of_a_sort(parts: list[list[float]], data: Any, absolute: bool) -> None:
    column, whole = filled(parts)
    whole = np.abs(whole) if absolute else whole
    ranks = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=9)))
    values, smaller = column.ranked(ranks, np.abs if absolute else None)
    np.testing.assert_array_equal(values, np.sort(whole)[ranks])
    np.testing.assert_array_equal(smaller, [(whole < value).sum() for value in values])


@pytest.mark.usefixtures("sorted_at_once")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.lists(st.floats(-1e9, 1e9), max_size=8), min_size=1, max_size=6).filter(any),
    levels=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_quantiles_are_those_of_numpy(parts: list[list[float]], levels: list[float]) -> None:
    column, whole = filled(parts)
    assert column.quantiles(levels) == tuple(np.quantile(whole, levels).tolist())


@given(parts=PARTS, data=st.data())
def test_sums_of_runs_are_those_of_the_runs(parts: list[list[float]], data: Any) -> None:
    column, whole = filled(parts)
    length: list[int] = []
    for part in parts:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(part)), max_size=4)))
        length += np.diff([0, *cuts, len(part)]).tolist()
    found = column.run_sums(lambda values: values > 0, np.array(length))
    np.testing.assert_array_equal(found, [(run > 0).sum() for run in np.split(whole, np.cumsum(length)[:-1])])


@given(parts=PARTS, data=st.data())
def test_distinct_values_from_a_limit_include_it(parts: list[list[float]], data: Any) -> None:
    column, whole = filled(parts)
    limit = data.draw(st.sampled_from(np.abs(whole).tolist()))
    wanted = np.unique(np.abs(whole))
    np.testing.assert_array_equal(column.distinct_from(limit, np.abs), wanted[wanted >= limit])


def test_sums_do_not_depend_on_parts() -> None:
    values, length = np.random.default_rng(0).normal(size=3000), np.array([700, 0, 1300, 1000])
    whole = Column.of(values).run_sums(np.expm1, length)
    column, _ = filled([values[:700].tolist(), values[700:].tolist()])
    np.testing.assert_array_equal(column.run_sums(np.expm1, length), whole)


@pytest.mark.parametrize("in_memory", [0, 100, 1 << 25])
def test_columns_share_a_file_that_leaves_nothing(tmp_path: Path, monkeypatch: Any, in_memory: int) -> None:
    monkeypatch.setattr(columns, "_IN_MEMORY", in_memory)
    scratch, rng = Scratch(tmp_path), np.random.default_rng(1)
    found = [Column(scratch), Column(scratch)]
    parts: list[list[np.ndarray]] = [[], []]
    for i in range(12):
        parts[i % 2].append(rng.normal(size=i))
        found[i % 2].append(parts[i % 2][-1])
    for column, wanted in zip(found, parts, strict=True):
        np.testing.assert_array_equal(column.whole(), np.concatenate(wanted))
        assert len(column) == len(column.whole())
        assert column.largest(np.abs) == np.abs(np.concatenate(wanted)).max()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(columns, "_IN_MEMORY", 8)
    with pytest.raises(TableError, match="cannot be written"):
        Column(Scratch(tmp_path / "missing")).append(np.zeros(100))
