"""Reading a pass's rows from a parquet file batch by batch, so that memory does not grow with the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mismatch_probe.errors import TableError

_BATCH_ROWS = 1 << 17


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a table is read into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise TableError(
            f"{path} does not exist.", "Finish the run with --resume, or run the comparison again."
        ) from None
    except (OSError, pa.ArrowException) as error:
        detail = str(error).splitlines()[0]
        raise TableError(
            f"{path} is corrupt or truncated ({detail}).", "Delete this file and run the comparison again."
        ) from None


def require_columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise TableError(f"{path} has no column {missing[0]}.", "Delete this file and run the comparison again.")


def with_nulls(table: pa.Table, schema: pa.Schema, names: Sequence[str]) -> pa.Table:
    """The table with those columns, null throughout where it has none."""
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
    return table


@dataclass(frozen=True)
class _Group:
    """A row group that may hold rows of the pass.

    Attributes:
        index: Number of the row group in the file.
        rows: Rows of the pass in it.
        pure: Whether all of its rows are of the pass, so that the column of passes need not be read.
    """

    index: int
    rows: int
    pure: bool


class PassRows:
    """The rows of one pass in a parquet file that may hold other passes too, found by the file's statistics.

    Args:
        path: The file.
        column: The column that names the pass of a row.
        pass_id: Which pass.
        schema: Types that known columns are cast to; other columns keep theirs.
        optional: Columns that are null where the file has none.

    Raises:
        TableError: The file is missing, corrupt, or has no `column`.
    """

    def __init__(self, path: Path, column: str, pass_id: str, schema: pa.Schema, optional: Sequence[str] = ()) -> None:
        self._path, self._column, self._pass_id = path, column, pass_id
        self._schema, self._optional = schema, optional
        with table_errors(path), pq.ParquetFile(path) as file:
            require_columns(path, file.schema_arrow.names, [column])
            groups = [self._group(file, index) for index in range(file.num_row_groups)]
        self._groups = [group for group in groups if group.rows]

    def __len__(self) -> int:
        return sum(group.rows for group in self._groups)

    def batches(
        self, columns: Sequence[str], *, rows: range | None = None, ids: tuple[int, int] | None = None
    ) -> Iterator[pa.Table]:
        """The pass's rows in file order, a batch at a time.

        Args:
            columns: What to read.
            rows: Only these rows of the pass, counted from 0.
            ids: Leave out row groups without any `sequence_id` between these two, both included.

        Raises:
            TableError: The file is corrupt, or misses a column.
        """
        with table_errors(self._path), pq.ParquetFile(self._path) as file:
            require_columns(self._path, [*file.schema_arrow.names, *self._optional], columns)
            first = 0
            for group in self._groups:
                inside = (
                    range(max(rows.start - first, 0), min(rows.stop - first, group.rows)) if rows is not None else None
                )
                first += group.rows
                if inside is not None and not inside:
                    continue
                if ids is None or _overlaps(file, group.index, "sequence_id", *ids):
                    yield from self._cut(self._read(file, group, columns), inside)

    def _group(self, file: pq.ParquetFile, index: int) -> _Group:
        bounds = _bounds(file, index, self._column)
        if bounds == (self._pass_id, self._pass_id):
            return _Group(index, file.metadata.row_group(index).num_rows, pure=True)
        if bounds is not None and not bounds[0] <= self._pass_id <= bounds[1]:
            return _Group(index, 0, pure=False)
        batches = self._read(file, _Group(index, 0, pure=False), [self._column])
        return _Group(index, sum(batch.num_rows for batch in batches), pure=False)

    def _read(self, file: pq.ParquetFile, group: _Group, columns: Sequence[str]) -> Iterator[pa.Table]:
        wanted = list(columns) if group.pure else list({*columns, self._column})
        wanted = [name for name in wanted if name in file.schema_arrow.names]
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group.index], columns=wanted):
            table = pa.Table.from_batches([batch])
            if not group.pure:
                table = table.filter(pc.equal(table[self._column].cast(pa.string()), self._pass_id))
            table = with_nulls(table, self._schema, [name for name in self._optional if name in columns])
            known = [self._schema.field(name) if name in self._schema.names else table.field(name) for name in columns]
            yield table.select(list(columns)).cast(pa.schema(known))

    @staticmethod
    def _cut(batches: Iterator[pa.Table], rows: range | None) -> Iterator[pa.Table]:
        first = 0
        for batch in batches:
            start, stop = 0, batch.num_rows
            if rows is not None:
                start, stop = max(rows.start - first, 0), min(rows.stop - first, batch.num_rows)
            first += batch.num_rows
            if start < stop:
                yield batch.slice(start, stop - start)
            if rows is not None and first >= rows.stop:
                return


def _bounds(file: pq.ParquetFile, group: int, column: str) -> tuple[Any, Any] | None:
    """Smallest and largest value of a column in a row group, None where the file does not say."""
    columns = file.metadata.row_group(group)
    for index in range(columns.num_columns):
        if columns.column(index).path_in_schema == column:
            statistics = columns.column(index).statistics
            if statistics is not None and statistics.has_min_max and not statistics.null_count:
                return statistics.min, statistics.max
    return None


def _overlaps(file: pq.ParquetFile, group: int, column: str, low: int, high: int) -> bool:
    bounds = _bounds(file, group, column)
    return bounds is None or (bounds[0] <= high and low <= bounds[1])
