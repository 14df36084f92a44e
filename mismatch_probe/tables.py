"""The tables of a run's folder, and how they reach the disk without ever being half-written.

A finished pass lies in `passes/` as its own files until the run ends; `merge` then writes `sequences.parquet` and
`tokens.parquet` (row groups by pass). So a run stops and resumes pass by pass. Every file appears by atomic rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mismatch_probe.errors import TableError
from mismatch_probe.files import atomic_path
from mismatch_probe.schemas import EXACT_SCHEMA, OPTIONAL, REFERENCE_SCHEMA, SEQUENCES_SCHEMA, TOKENS_SCHEMA

_BATCH_ROWS = 1 << 17
_GROUP_ROWS, _GROUP_BYTES = 1 << 20, 1 << 26
# Schema of each kind of table, and the column that names the pass of a row.
_KINDS = {
    "sequences": (SEQUENCES_SCHEMA, "rollout_pass"),
    "tokens": (TOKENS_SCHEMA, "pass_id"),
    "reference": (REFERENCE_SCHEMA, "pass_id"),
    "exact": (EXACT_SCHEMA, "pass_id"),
}


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


def _write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Writes tables one after another, a row group each, and returns the number of rows."""
    rows = 0
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            rows += table.num_rows
    return rows


def _grouped(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about a million, fewer where they are long, so that not all are in memory."""
    kept: list[pa.Table] = []
    for batch in batches:
        kept.append(batch)
        rows, size = (sum(counts) for counts in zip(*((one.num_rows, one.nbytes) for one in kept), strict=True))
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield pa.concat_tables(kept).unify_dictionaries()
            kept = []
    if kept:
        yield pa.concat_tables(kept).unify_dictionaries()


def _read_parquet(path: Path, schema: pa.Schema, **options: Any) -> pa.Table:
    with table_errors(path):
        table = pq.read_table(path, **options)
        table = with_nulls(table, schema, [name for name in OPTIONAL if name in schema.names])
        require_columns(path, table.column_names, schema.names)
        return table.select(schema.names).cast(schema)


class PassTables:
    """Tables of passes in a folder. A subclass knows which passes are there and how many rows each has."""

    path: Path

    def rows_of(self, pass_id: str) -> Mapping[str, int]:
        """Rows of a pass by kind of table; empty for a pass that has not finished."""
        raise NotImplementedError

    def source_of(self, pass_id: str) -> str:
        """The pass that sampled, or whose file recorded, the sequences of a rollout pass: most often itself."""
        raise NotImplementedError

    def _part(self, pass_id: str, kind: str, rows: int | None) -> Path:
        """A pass's own file. Its row count is part of its name, so that the manifest says which of two is the valid one
        when a pass that is extended is interrupted between its table and the manifest.
        """
        return self.path / "passes" / f"{pass_id}.{kind}.{rows}.parquet"

    def write_pass(self, pass_id: str, tables: Mapping[str, pa.Table | Iterator[pa.Table]]) -> dict[str, int]:
        """Writes a pass's own files.

        Args:
            pass_id: Which pass.
            tables: By kind: `tokens` or `reference`, and where it has them `sequences` and `exact`; whole or in parts.

        Returns:
            Rows by kind.
        """
        rows = {}
        for kind, table in tables.items():
            parts = [table] if isinstance(table, pa.Table) else table
            unnamed = self.path / "passes" / f"{pass_id}.{kind}.parquet"
            rows[kind] = _write_parquet(unnamed, parts, _KINDS[kind][0])
            os.replace(unnamed, self._part(pass_id, kind, rows[kind]))
        return rows

    def sequences(self, pass_id: str) -> pa.Table:
        """Sequences of one rollout pass, or of the pass that it took them from.

        Raises:
            TableError: They are missing, corrupt, or not as many as the manifest says.
        """
        return self._rows(self.source_of(pass_id), "sequences")

    def exact(self, pass_id: str) -> pa.Table | None:
        """Exact divergences of one trainer pass; None where it compared no rows.

        Raises:
            TableError: They are missing, corrupt, or not as many as the manifest says.
        """
        return self._rows(pass_id, "exact") if "exact" in self.rows_of(pass_id) else None

    def tokens(self, pass_id: str) -> pa.Table:
        """Token rows of one pass, sorted by sequence and position.

        Raises:
            TableError: They are missing, corrupt, or not as many as the manifest says.
        """
        return self._rows(pass_id, self._kind(pass_id))

    def iter_tokens(
        self,
        pass_id: str,
        columns: Sequence[str],
        *,
        rows: range | None = None,
        ids: tuple[int, int] | None = None,
    ) -> Iterator[pa.Table]:
        """Token rows of one pass, sorted by sequence and position, a batch at a time.

        Args:
            pass_id: Which pass.
            columns: What to read: columns of `TOKENS_SCHEMA`, or others that the file has after them.
            rows: Only these rows of the pass, counted from 0.
            ids: Row groups without any `sequence_id` between these two are left out; others come whole.

        Raises:
            TableError: They are missing, corrupt, or not as many as the manifest says.
        """
        return self._reader(pass_id, self._kind(pass_id)).batches(columns, rows=rows, ids=ids)

    def _kind(self, pass_id: str) -> str:
        """The table that holds a pass's token rows."""
        return "reference" if "reference" in self.rows_of(pass_id) else "tokens"

    def sequence_names(self, pass_id: str) -> pa.Table:
        """`sequence_id`, `prompt_id` and `step` of the sequences of one rollout pass, without their texts.

        Raises:
            TableError: They are missing, corrupt, or not as many as the manifest says.
        """
        columns = ["sequence_id", "prompt_id", "step"]
        schema = pa.schema([SEQUENCES_SCHEMA.field(name) for name in columns])
        return pa.concat_tables(
            [schema.empty_table(), *self._reader(self.source_of(pass_id), "sequences").batches(columns)]
        ).unify_dictionaries()

    def merge_passes(self, passes: Sequence[str]) -> None:
        """Writes `sequences.parquet` and `tokens.parquet` from the parts of finished passes, and drops the parts.

        A run that was merged while some pass was still missing is merged again from table and parts.
        """
        rows = {name: self.rows_of(name) for name in passes}
        if not any(self._part(name, kind, n).exists() for name in passes for kind, n in rows[name].items()):
            return
        for kind, (schema, _) in _KINDS.items():
            if not any(kind in rows[name] for name in passes):
                continue
            readers = (self._reader(name, kind) for name in passes if kind in rows[name])
            tables = (table for reader in readers for table in _grouped(reader.batches(schema.names)))
            _write_parquet(self.path / f"{kind}.parquet", tables, schema)
        shutil.rmtree(self.path / "passes")  # with whatever a killed process left there unfinished

    def _rows(self, pass_id: str, kind: str) -> pa.Table:
        """A pass's rows of one kind: its own file where that is still there, else its part of the merged file."""
        schema, column = _KINDS[kind]
        path = self._file(pass_id, kind)
        merged = path.parent == self.path
        table = _read_parquet(path, schema, **({"filters": [(column, "=", pass_id)]} if merged else {}))
        self._check_rows(pass_id, kind, table.num_rows)
        return table

    def _reader(self, pass_id: str, kind: str) -> PassRows:
        """The same, to be read in batches."""
        schema, column = _KINDS[kind]
        reader = PassRows(self._file(pass_id, kind), column, pass_id, schema, OPTIONAL)
        self._check_rows(pass_id, kind, len(reader))
        return reader

    def _file(self, pass_id: str, kind: str) -> Path:
        part = self._part(pass_id, kind, self.rows_of(pass_id).get(kind))
        return part if part.exists() else self.path / f"{kind}.parquet"

    def _check_rows(self, pass_id: str, kind: str, rows: int) -> None:
        expected = self.rows_of(pass_id).get(kind)
        if rows != expected:
            raise TableError(
                f"Pass {pass_id} has {rows} {kind} on disk; the manifest says {expected}.",
                "Restore the files or run the comparison again.",
            )
