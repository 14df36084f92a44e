"""Rows on their way from a reader to `recorded.parquet`, and the rules that every row obeys, whatever its format.

Rows are taken one by one, checked in chunks on whole arrays, and written; memory is that of a chunk. A row whose lists
do not run along its response, or which has an id that cannot be one, is left out and accounted for.

Shape legend: `R` rows of a chunk.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mismatch_probe.errors import IngestError
from mismatch_probe.files import writing
from mismatch_probe.ingest.accounting import Accounting
from mismatch_probe.ingest.base import Place, Record, Row, quoted, wrong_length
from mismatch_probe.ingest.chunk import Chunk, Lists
from mismatch_probe.ingest.formats import GENERIC, Format
from mismatch_probe.ingest.keys import IDS, KEYS, NAMED, PER_ROW, PER_TOKEN, PROMPT, RESPONSE
from mismatch_probe.ingest.values import LARGEST_ID, list_of, per_row, per_token, require_ids, split
from mismatch_probe.results.dump import Recorded, Source

T = TypeVar("T")
UNIFORM = tuple(key.name for key in KEYS.values() if key.uniform)
_DIGEST_LENGTH = 16
_MOST_IGNORED = 100
# A chunk, which becomes a row group: some 20 MB.
_CHUNK_TOKENS, _CHUNK_ROWS = 1 << 18, 1 << 14
_TEXT = pa.dictionary(pa.int32(), pa.string())
_TYPES = {
    "ids": pa.int32(),
    "logprob": pa.float64(),
    "number": pa.float64(),
    "integer": pa.int64(),
    "mask": pa.bool_(),
    "label": _TEXT,
}


@dataclass
class _Pending:
    """Rows that are not a chunk yet."""

    places: list[Place] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lists: dict[str, list[NDArray[Any] | None]] = field(default_factory=dict)
    scalars: dict[str, list[Any]] = field(default_factory=dict)
    n_values: int = 0

    def add(self, record: Record, row: Row) -> None:
        """Takes a row, whose values become arrays."""
        row = split(record, row)
        require_ids(record, row)
        arrays = {name: list_of(record, name, row[name]) for name in IDS}
        n = len(arrays[RESPONSE])
        named = [name for name in PER_TOKEN if row.get(name) is not None]
        arrays |= {name: per_token(record, KEYS[name], row[name], n) for name in named}
        values = {name: per_row(record, KEYS[name], row[name]) for name in PER_ROW if row.get(name) is not None}
        _append(self.lists, arrays, len(self.rows))
        _append(self.scalars, values, len(self.rows))
        self.places.append(record.place)
        self.rows.append(record.row)
        self.n_values += sum(map(len, arrays.values()))

    @property
    def full(self) -> bool:
        """Whether it is time to make a chunk."""
        return self.n_values >= 4 * _CHUNK_TOKENS or len(self.rows) >= _CHUNK_ROWS

    def chunk(self) -> Chunk:
        """The rows as a chunk."""
        lists = {}
        for name, column in self.lists.items():
            lengths = np.array([-1 if one is None else len(one) for one in column], np.int64)
            nothing = np.empty(0, np.int64 if KEYS[name].kind in ("ids", "integer") else np.float64)
            parts = [one for one in column if one is not None and len(one)]
            lists[name] = Lists(np.concatenate(parts) if parts else nothing, lengths)
        return Chunk(self.places, np.array(self.rows, np.int64), lists, self.scalars)


def _append(columns: dict[str, list[T | None]], values: Mapping[str, T], n_rows: int) -> None:
    """Adds a row to columns of `n_rows`, one of which may be new."""
    for name in values.keys() - columns.keys():
        columns[name] = [None] * n_rows
    for name, column in columns.items():
        column.append(values.get(name))


class Collector:
    """Takes row after row and writes those that keep the rules; memory does not grow with the tokens.

    Args:
        path: The file to be written.
        vocabulary: How many ids the model has; rows with others are left out. None where it is not known.
    """

    def __init__(self, path: Path, vocabulary: int | None = None) -> None:
        self._path = path
        self._largest_id = LARGEST_ID if vocabulary is None else min(vocabulary - 1, LARGEST_ID)
        self._accounting = Accounting(vocabulary)
        self._pending = _Pending()
        self._writer: pq.ParquetWriter | None = None
        self._present: dict[str, bool] = {}
        self._first: tuple[Place, int] | None = None
        self._refusal: IngestError | None = None
        self._ignored: set[str] = set()
        self._samples: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._longest: Counter[str] = Counter()

    def take(self, record: Record, of: Format) -> None:
        """Takes the rows of a record.

        Raises:
            IngestError: A value is of another kind than its key, or a row misses what the others have.
        """
        for row in of.rows(replace(record, written_for=of.written_for)):
            self._pending.add(record, row)
            if self._pending.full:
                self._flush()
        if of.name == GENERIC:
            self._ignored.update(record.fields.keys() - NAMED)

    def _flush(self) -> None:
        if not self._pending.rows:
            return
        chunk, self._pending = self._pending.chunk(), _Pending()
        self._counts["rows"] += len(chunk.rows)
        chunk = chunk.keep(self._sound(chunk))
        self._accounting.update(chunk)
        empty = chunk.lists[RESPONSE].lengths == 0
        self._counts["empty"] += int(empty.sum())
        chunk = chunk.keep(~empty)
        if len(chunk.rows):
            self._check_presence(chunk)
            self._count(chunk)
            self._write(chunk)

    def _sound(self, chunk: Chunk) -> NDArray[np.bool_]:
        """`[R]` which rows have lists of the right lengths and ids that can be some.

        Raises:
            IngestError: A mask holds something else than 0 and 1.
        """
        if "loss_mask" in chunk.lists:
            mask = chunk.lists["loss_mask"]
            for row, position, value in mask.first((mask.values != 0) & (mask.values != 1)):
                what = f"has {value} as loss_mask[{position}], which is neither 0 nor 1"
                chunk.refuse(row, what, "Write one 0 or 1 per response token.")
        known = np.ones(len(chunk.rows), bool)
        for key in IDS:
            column = chunk.lists[key]
            for row, position, value in column.first((column.values < 0) | (column.values > self._largest_id)):
                what = f"has {value} as {key}[{position}], which is outside 0 to {self._largest_id}"
                self._leave_out(chunk, row, what, "Write the ids that the model saw, without padding.", known)
        if not known.all():
            self._accounting.left_out_ids(chunk.keep(~known))
        return known & self._along_response(chunk, known)

    def _along_response(self, chunk: Chunk, known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[R]` which rows have lists along their response; those that are not `known` are left out already."""
        sound = known.copy()
        prompts, responses = (chunk.lists[key].lengths for key in IDS)
        for key in PER_TOKEN:
            if key not in chunk.lists:
                continue
            lengths = chunk.lists[key].lengths
            for row in np.flatnonzero(sound & (lengths >= 0) & (lengths != responses)).tolist():
                length, prompt, response = (int(each[row]) for each in (lengths, prompts, responses))
                self._accounting.left_out(int(chunk.rows[row]), chunk.places[row].name, key, length, response, prompt)
                self._leave_out(chunk, row, *wrong_length(key, length, prompt, response), sound)
        return sound

    def _leave_out(self, chunk: Chunk, row: int, what: str, fix: str, sound: NDArray[np.bool_]) -> None:
        """Leaves a row out, once; the first reason of all is kept, for where no row remains."""
        if sound[row]:
            sound[row] = False
            self._counts["left_out"] += 1
        self._refusal = self._refusal or IngestError(chunk.places[row].said(int(chunk.rows[row]), what), fix)

    def _check_presence(self, chunk: Chunk) -> None:
        """With holes in a column, two metrics of one file would be about different tokens."""
        present = {key: chunk.present(key) for key in UNIFORM}
        if self._first is None:
            self._first = chunk.places[0], int(chunk.rows[0])
            self._present = {key: bool(there[0]) for key, there in present.items()}
        place, row = self._first
        for key, there in present.items():
            odd = np.flatnonzero(there != self._present[key])
            if len(odd):
                same = place == chunk.places[odd[0]]
                first = f"{place.row_word.lower()} {row}" + ("" if same else f" of {place.name}")
                no, yes = f"has no {key}, which {first} has", f"has {key}, which {first} does not have"
                what = no if self._present[key] else yes
                chunk.refuse(int(odd[0]), what, f"Write {key} in every row or in none.")

    def _count(self, chunk: Chunk) -> None:
        prompts, responses = (chunk.lists[key] for key in IDS)
        self._counts["sequences"] += len(chunk.rows)
        self._counts["prompt_tokens"] += len(prompts.values)
        self._counts["tokens"] += len(responses.values)
        self._counts["empty_prompts"] += int((prompts.lengths == 0).sum())
        if self._present["loss_mask"]:
            mask = chunk.lists["loss_mask"].values.astype(bool)
            self._counts["masked"] += int((~mask).sum())
            alive = np.logical_or.reduceat(mask, responses.offsets[:-1])
            self._counts["masked_sequences"] += int((~alive).sum())
        largest = max(int(column.values.max(initial=0)) for column in (prompts, responses))
        for name, value in (
            ("prompt", int(prompts.lengths.max())),
            ("response", int(responses.lengths.max())),
            ("sequence", int((prompts.lengths + responses.lengths).max())),
            ("id", largest),
        ):
            self._longest[name] = max(self._longest[name], value)

    def _write(self, chunk: Chunk) -> None:
        columns: dict[str, pa.Array] = {}
        for key in (*IDS, *(key for key in PER_TOKEN if self._present[key])):
            column, kind = chunk.lists[key], _TYPES[KEYS[key].kind]
            values = pa.array(column.values.astype(kind.to_pandas_dtype(), copy=False), kind)
            columns[key] = pa.ListArray.from_arrays(pa.array(column.offsets, pa.int32()), values)
        names = chunk.scalars["prompt_id"] if self._present["prompt_id"] else _digests(chunk.lists[PROMPT])
        columns["prompt_id"] = pa.array(names, pa.string()).dictionary_encode()
        columns["sample_id"] = pa.array([self._running_number(name) for name in names], pa.int32())
        for key in PER_ROW:
            if key != "prompt_id" and self._present.get(key, True):
                values = chunk.scalars.get(key) or [None] * len(chunk.rows)
                self._seen.update([key] if any(value not in (None, "") for value in values) else [])
                columns[key] = _column(values, _TYPES[KEYS[key].kind])
        columns["file"] = pa.array([place.name for place in chunk.places]).dictionary_encode()
        columns["row"] = pa.array(chunk.rows)
        table = pa.table(columns)
        with writing(self._path):
            if self._writer is None:
                text = [name for name in table.column_names if pa.types.is_dictionary(table.schema.field(name).type)]
                self._writer = pq.ParquetWriter(
                    self._path, table.schema, compression="zstd", compression_level=1, use_dictionary=text
                )
            self._writer.write_table(table)

    def _running_number(self, name: str) -> int:
        number = self._samples[name]
        self._samples[name] += 1
        return number

    def finish(self, path: str, of: Format, digest: tuple[int, str]) -> Recorded:
        """Writes what is left and says what there is; call it once.

        Args:
            path: The dump as the user gave it.
            of: Its format.
            digest: How many files were read, and the digest of their bytes.

        Raises:
            IngestError: There is no row, no response token, or none that counts.
        """
        self._flush()
        self.close()
        counts, place = self._counts, Place(path, "Row")
        if not counts["rows"]:
            place.refuse_file("has no rows", "Write one row per sequence.")
        if not counts["sequences"]:
            if self._refusal is not None:
                raise self._refusal
            place.refuse_file("has no response tokens", "Record response_token_ids as sampled.")
        if counts["masked"] == counts["tokens"]:
            place.refuse_file("has a loss_mask of only zeros", "Set it to 1 for the tokens to compare.")
        keys = [key for key in KEYS if key in IDS or self._present.get(key) or key in self._seen]
        return Recorded(
            rollout=self._present["rollout_logprobs"],
            trainer=self._present["trainer_logprobs"],
            file=Source(
                path=path,
                format=of.name,
                written_for=of.written_for,
                n_files=digest[0],
                sha256=digest[1],
                keys=tuple(keys),
                n_rows=counts["rows"],
                n_left_out=counts["left_out"],
                n_empty_responses=counts["empty"],
                n_sequences=counts["sequences"],
                n_prompts=len(self._samples),
                n_prompt_tokens=counts["prompt_tokens"],
                n_tokens=counts["tokens"],
                n_masked_tokens=counts["masked"],
                n_masked_sequences=counts["masked_sequences"],
                n_empty_prompts=counts["empty_prompts"],
                longest_prompt=self._longest["prompt"],
                longest_response=self._longest["response"],
                longest_sequence=self._longest["sequence"],
                largest_id=self._longest["id"],
                ignored_columns=_listed(self._ignored),
                findings=self._accounting.findings(),
            ),
        )

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            with writing(self._path):
                self._writer.close()


def _digests(prompts: Lists) -> list[str]:
    """A name for each prompt that depends on its ids alone, not on the file nor the machine."""
    ids, offsets = prompts.values.astype("<i4"), prompts.offsets.tolist()
    return [hashlib.sha256(ids[start:end].tobytes()).hexdigest()[:_DIGEST_LENGTH] for start, end in pairwise(offsets)]


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode() if kind == _TEXT else pa.array(values, kind)


def _listed(names: Iterable[str]) -> tuple[str, ...]:
    ordered = sorted(names)
    more = len(ordered) - _MOST_IGNORED
    return (*(quoted(name)[1:-1] for name in ordered[:_MOST_IGNORED]), *([f"and {more} more"] if more > 0 else []))
