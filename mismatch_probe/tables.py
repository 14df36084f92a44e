"""The run directory: its tables, its manifest, and how both reach the disk without ever being half-written.

A finished pass lies in `passes/` as its own files until the run ends; `merge` then writes `sequences.parquet` and
`tokens.parquet` (row groups by pass). So a run stops and resumes pass by pass. Every file appears by atomic rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.files import LOCK, atomic_path, write_json
from mismatch_probe.rowgroups import PassRows, require_columns, table_errors, with_nulls
from mismatch_probe.types import DIVERGENCES, Rollout, RolloutRequest, Score

SCHEMA_VERSION = 1
_MANIFEST_KEYS = ("status", "config", "sizes", "device", "model", "prompts", "passes")
_TEXT = pa.dictionary(pa.int32(), pa.string())

SEQUENCES_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("prompt_id", _TEXT),
        ("sample_id", pa.int32()),
        ("rollout_pass", _TEXT),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("finish_reason", _TEXT),
        ("text", pa.string()),
        ("step", pa.int64()),
    ]
)
TOKENS_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("pass_id", _TEXT),
        ("logprob", pa.float32()),
        ("token_text", _TEXT),
        ("entropy", pa.float32()),
        ("rank", pa.int32()),
    ]
)
# Passes that serve as a reference keep all digits, in a table of their own.
REFERENCE_SCHEMA = TOKENS_SCHEMA.set(TOKENS_SCHEMA.get_field_index("logprob"), pa.field("logprob", pa.float64()))
EXACT_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("rollout_pass", _TEXT),
        ("pass_id", _TEXT),
        ("weight", pa.float64()),
        ("stands_for", pa.float64()),
        *((name, pa.float64()) for name in DIVERGENCES),
    ]
)

# Schema of each kind of table, and the column that names the pass of a row.
_KINDS = {
    "sequences": (SEQUENCES_SCHEMA, "rollout_pass"),
    "tokens": (TOKENS_SCHEMA, "pass_id"),
    "reference": (REFERENCE_SCHEMA, "pass_id"),
    "exact": (EXACT_SCHEMA, "pass_id"),
}
# By sequence, which of its response tokens count.
Masks = Mapping[int, NDArray[np.bool_]]
# Columns that earlier releases did not write; where they are missing they are null.
_OPTIONAL = ("step", "entropy", "rank")


def _dictionary(values: Sequence[str | None]) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode().cast(_TEXT)


def _constant(value: str, length: int) -> pa.Array:
    """A dictionary-encoded column of one value, without a Python object per row."""
    return pa.DictionaryArray.from_arrays(np.zeros(length, np.int32), pa.array([value], pa.string()))


def sequences_table(
    rollout_pass: str,
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    prompt_ids: Sequence[str],
    sample_ids: Sequence[int],
    steps: Sequence[int] | None = None,
) -> pa.Table:
    """One row per sequence; the sequences run in parallel and have one length. `steps` are training steps."""
    return pa.table(
        {
            "sequence_id": pa.array([r.sequence_id for r in requests], pa.int64()),
            "prompt_id": _dictionary(prompt_ids),
            "sample_id": pa.array(sample_ids, pa.int32()),
            "rollout_pass": _constant(rollout_pass, len(requests)),
            "prompt_token_ids": pa.array([r.prompt_token_ids for r in requests], pa.list_(pa.int32())),
            "response_token_ids": pa.array([np.asarray(r.response_token_ids) for r in rollouts], pa.list_(pa.int32())),
            "finish_reason": _dictionary([r.finish_reason for r in rollouts]),
            "text": pa.array([r.text for r in rollouts], pa.string()),
            "step": pa.array([None] * len(rollouts) if steps is None else steps, pa.int64()),
        },
        schema=SEQUENCES_SCHEMA,
    )


def tokens_table(
    pass_id: str,
    items: Iterable[Rollout | Score],
    token_ids: Callable[[Any], Sequence[int]],
    token_text: Callable[[int], str | None] = lambda _: None,
    schema: pa.Schema = TOKENS_SCHEMA,
    masks: Masks | None = None,
) -> pa.Table:
    """One row per response token, sorted by sequence and position.

    Args:
        pass_id: What was run, e.g. `"vllm-bfloat16-decode"`.
        items: Sequences with `sequence_id` and `logprobs` (nats, one per token).
        token_ids: The response ids of an item, as long as its `logprobs`.
        token_text: The text of a token id, where known.
        schema: `TOKENS_SCHEMA`, or `REFERENCE_SCHEMA` to keep float64 log-probs.
        masks: Which response tokens get a row, by sequence; None for all.
    """
    ordered = sorted(items, key=lambda item: item.sequence_id)
    ids = [np.asarray(token_ids(item), dtype=np.int32) for item in ordered]
    for item, tokens in zip(ordered, ids, strict=True):
        if len(tokens) != len(item.logprobs):
            raise TableError(
                f"Pass {pass_id} returned {len(item.logprobs)} log-probs for the {len(tokens)} tokens of "
                f"sequence {item.sequence_id}.",
                "This is a fault of the engine or its adapter; please report it.",
            )
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    flat = np.concatenate([np.empty(0, np.int32), *ids])
    vocabulary, index = np.unique(flat, return_inverse=True)
    texts = _dictionary([token_text(token) for token in vocabulary.tolist()])
    table = pa.table(
        {
            "sequence_id": np.repeat(np.array([item.sequence_id for item in ordered], dtype=np.int64), lengths),
            "position": np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)]),
            "token_id": flat,
            "pass_id": _constant(pass_id, len(flat)),
            "logprob": _joined([item.logprobs for item in ordered], schema.field("logprob").type),
            "token_text": texts.take(pa.array(index)),
            "entropy": _optional_column([getattr(item, "entropy", None) for item in ordered], len(flat), pa.float32()),
            "rank": _optional_column([getattr(item, "rank", None) for item in ordered], len(flat), pa.int32()),
        },
        schema=schema,
    )
    if masks is None:
        return table
    return table.filter(np.concatenate([np.empty(0, np.bool_), *(masks[item.sequence_id] for item in ordered)]))


def exact_table(
    pass_id: str, sources: Sequence[str], scores: Iterable[Score], masks: Masks | None = None
) -> pa.Table | None:
    """What a trainer pass compared of the rows that rollout passes kept; None where it compared none.

    Args:
        pass_id: The trainer pass.
        sources: Rollout pass of each `source` in the scores' columns.
        scores: Of the pass.
        masks: Which response tokens count, by sequence; None for all.
    """
    parts = [score.exact for score in scores if score.exact is not None]
    if not parts:
        return None
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((columns["position"], columns["sequence_id"], columns["source"]))
    if masks is not None:
        at = zip(columns["sequence_id"][order].tolist(), columns["position"][order].tolist(), strict=True)
        order = order[np.array([bool(masks[sequence][position]) for sequence, position in at], np.bool_)]
    source = pa.DictionaryArray.from_arrays(columns["source"][order].astype(np.int32), pa.array(sources, pa.string()))
    return pa.table(
        {
            "sequence_id": columns["sequence_id"][order],
            "position": columns["position"][order].astype(np.int32),
            "rollout_pass": source,
            "pass_id": _constant(pass_id, len(order)),
            **{name: columns[name][order].astype(np.float64) for name in ("weight", "stands_for", *DIVERGENCES)},
        },
        schema=EXACT_SCHEMA,
    )


def _joined(parts: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(np.concatenate([np.empty(0), *(np.asarray(part, np.float64) for part in parts)])).cast(kind)


def _optional_column(parts: Sequence[Any], length: int, kind: pa.DataType) -> pa.Array:
    """A column that an item may lack; then it is null throughout."""
    if not parts or any(part is None for part in parts):
        return pa.nulls(length, kind)
    return pa.array(np.concatenate(parts)).cast(kind)


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run directory.

    Raises:
        TableError: The file is missing, is not JSON, or has an unknown schema version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TableError(f"{path} does not exist.", "Give the folder that `mismatch-probe compare` wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(
            f"{path} cannot be read as JSON ({error}).", "Restore the file or run the comparison again."
        ) from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise TableError(
            f"{path} has schema version {version!r}; this release reads version {SCHEMA_VERSION}.",
            "Use the release of mismatch-probe that wrote it, or a newer one.",
        )
    return document


def _write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _read_parquet(path: Path, schema: pa.Schema, **options: Any) -> pa.Table:
    with table_errors(path):
        table = pq.read_table(path, **options)
        table = with_nulls(table, schema, [name for name in _OPTIONAL if name in schema.names])
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
        raise UsageError(f"{path} is no folder for a run ({error.strerror}).", "Choose another --out.") from None
    if occupied:
        raise UsageError(f"{path} exists and is not empty.", "Choose another --out, or continue it with --resume.")


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
        reader = PassRows(self._file(pass_id, kind), column, pass_id, schema, _OPTIONAL)
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
                f"Pass {pass_id} has {rows} {kind} on disk where the manifest says {expected}.",
                "Restore the files or run the comparison again.",
            )
