"""The tables of a run's folder, and how they reach the disk without ever being half-written.

A finished pass lies in `passes/` as its own files until the run ends; `merge` then writes `sequences.parquet` and
`tokens.parquet` (row groups by pass). So a run stops and resumes pass by pass. Every file appears by atomic rename.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mismatch_probe.errors import TableError
from mismatch_probe.files import atomic_path
from mismatch_probe.rowgroups import PassRows, require_columns, table_errors, with_nulls
from mismatch_probe.schemas import EXACT_SCHEMA, OPTIONAL, REFERENCE_SCHEMA, SEQUENCES_SCHEMA, TOKENS_SCHEMA

# Schema of each kind of table, and the column that names the pass of a row.
_KINDS = {
    "sequences": (SEQUENCES_SCHEMA, "rollout_pass"),
    "tokens": (TOKENS_SCHEMA, "pass_id"),
    "reference": (REFERENCE_SCHEMA, "pass_id"),
    "exact": (EXACT_SCHEMA, "pass_id"),
}


def _write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


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

    def write_pass(self, pass_id: str, tables: Mapping[str, pa.Table]) -> dict[str, int]:
        """Writes a pass's own files.

        Args:
            pass_id: Which pass.
            tables: By kind: `tokens` or `reference`, and where it has them `sequences` and `exact`.

        Returns:
            Rows by kind.
        """
        rows = {kind: table.num_rows for kind, table in tables.items()}
        for kind, table in tables.items():
            _write_parquet(self._part(pass_id, kind, rows[kind]), [table], _KINDS[kind][0])
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
            tables = (self._rows(name, kind) for name in passes if kind in rows[name])
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
