"""The run directory: its tables, its manifest, and how both reach the disk without ever being half-written.

A finished pass lies in `passes/` as its own files until the run ends; `merge` then writes `sequences.parquet` and
`tokens.parquet` (row groups by pass). So a run stops and resumes pass by pass. Every file appears by atomic rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.files import LOCK, atomic_path, write_json
from mismatch_probe.rowgroups import PassRows, require_columns, table_errors, with_nulls
from mismatch_probe.schemas import EXACT_SCHEMA, OPTIONAL, REFERENCE_SCHEMA, SEQUENCES_SCHEMA, TOKENS_SCHEMA

SCHEMA_VERSION = 1
_MANIFEST_KEYS = ("status", "config", "sizes", "device", "model", "prompts", "passes")
# Schema of each kind of table, and the column that names the pass of a row.
_KINDS = {
    "sequences": (SEQUENCES_SCHEMA, "rollout_pass"),
    "tokens": (TOKENS_SCHEMA, "pass_id"),
    "reference": (REFERENCE_SCHEMA, "pass_id"),
    "exact": (EXACT_SCHEMA, "pass_id"),
}


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run directory.

    Raises:
        TableError: The file is missing, is not JSON, or has an unknown schema version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TableError(f"{path} does not exist.", "Give a folder written by `mismatch-probe compare`.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(
            f"{path} cannot be read as JSON ({error}).", "Restore the file or run the comparison again."
        ) from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise TableError(
            f"{path} has schema version {version!r}; this release reads version {SCHEMA_VERSION}.",
            "Use the release that wrote it, or a newer one.",
        )
    return document


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


def refuse_occupied(path: Path) -> None:
    """Checks that a new run may be made at `path`.

    Raises:
        UsageError: The folder exists and is not empty, or is no folder.
    """
    try:
        occupied = any(entry.name != LOCK for entry in path.iterdir())
    except FileNotFoundError:
        occupied = False
    except OSError as error:
        raise UsageError(
            f"{path} cannot be used as a run folder ({error.strerror}).", "Choose another --out."
        ) from None
    if occupied:
        raise UsageError(f"{path} is not empty.", "Choose another --out, or continue the run with --resume.")


class RunDirectory:
    """A run's folder, opened by one process at a time.

    `manifest` is the document behind `manifest.json`; change it, then call `save`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> RunDirectory:
        """Makes a new run folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        refuse_occupied(path)
        run = cls(path, {"schema_version": SCHEMA_VERSION, "status": "running", **manifest, "passes": {}})
        run.save()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Opens an existing run folder.

        Raises:
            TableError: It is no run folder, or its manifest cannot be read.
        """
        manifest = read_json(path / "manifest.json")
        missing = [key for key in _MANIFEST_KEYS if key not in manifest]
        if missing:
            raise TableError(
                f"{path / 'manifest.json'} has no {missing[0]!r}.", "Restore the file or run the comparison again."
            )
        return cls(path, manifest)

    def save(self) -> None:
        write_json(self.path / "manifest.json", self.manifest)

    def _part(self, pass_id: str, kind: str, rows: int) -> Path:
        """A pass's own file. Its row count is part of its name, so that the manifest says which of two is the valid one
        when a pass that is extended is interrupted between its table and the manifest.
        """
        return self.path / "passes" / f"{pass_id}.{kind}.{rows}.parquet"

    def finish_pass(self, pass_id: str, record: dict[str, Any], tables: Mapping[str, pa.Table]) -> None:
        """Stores a finished pass; after this call a resumed run will not compute it again.

        Args:
            pass_id: Which pass.
            record: What the manifest is to say of it.
            tables: By kind: `tokens` or `reference`, and where it has them `sequences` and `exact`.
        """
        rows = {kind: table.num_rows for kind, table in tables.items()}
        for kind, table in tables.items():
            _write_parquet(self._part(pass_id, kind, rows[kind]), [table], _KINDS[kind][0])
        self.manifest["passes"][pass_id] = {**record, "status": "finished", "rows": rows}
        self.save()

    def finished(self, pass_id: str) -> bool:
        record: dict[str, Any] = self.manifest["passes"].get(pass_id, {})
        return record.get("status") == "finished"

    def finished_passes(self) -> list[str]:
        return [pass_id for pass_id in self.manifest["passes"] if self.finished(pass_id)]

    def source_of(self, pass_id: str) -> str:
        """The pass that sampled, or whose file recorded, the sequences of a rollout pass: most often itself."""
        return str(self.manifest["passes"].get(pass_id, {}).get("sequences_of", pass_id))

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
        has = "exact" in self.manifest["passes"].get(pass_id, {}).get("rows", {})
        return self._rows(pass_id, "exact") if has else None

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
        return "reference" if "reference" in self.manifest["passes"].get(pass_id, {}).get("rows", {}) else "tokens"

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

    def merge(self) -> None:
        """Writes `sequences.parquet` and `tokens.parquet` from the finished passes and drops the parts.

        A run that was merged while some pass was still missing is merged again from table and parts.
        """
        passes = self.finished_passes()
        rows = {name: self.manifest["passes"][name]["rows"] for name in passes}
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

    def _expected(self, pass_id: str, kind: str) -> Any:
        return self.manifest["passes"].get(pass_id, {}).get("rows", {}).get(kind)

    def _file(self, pass_id: str, kind: str) -> Path:
        part = self._part(pass_id, kind, self._expected(pass_id, kind))
        return part if part.exists() else self.path / f"{kind}.parquet"

    def _check_rows(self, pass_id: str, kind: str, rows: int) -> None:
        expected = self._expected(pass_id, kind)
        if rows != expected:
            raise TableError(
                f"Pass {pass_id} has {rows} {kind} on disk; the manifest says {expected}.",
                "Restore the files or run the comparison again.",
            )
