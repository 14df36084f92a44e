"""Files as records: JSON lines, a JSON document, Parquet. What lies in a record is a format's business.

A container yields record after record and holds one at a time, but for those of `LOADED_WHOLE`, which are loaded whole.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.base import Place, Record, kind, quoted
from mismatch_probe.ingest.values import EXAMPLE

_BOM = b"\xef\xbb\xbf"
# A line of a million tokens with two log-probs each is 50 MB.
_LONGEST_LINE = 1 << 28
_LONGEST_ROW = 1 << 26
_BLOCK = 1 << 20
# Of a batch of rows: at most so many, and about so many values.
_BATCH_ROWS, _BATCH_VALUES = 1024, 1 << 21


@dataclass(frozen=True)
class DumpFile:
    """A file of a dump.

    Attributes:
        path: Where it is.
        name: What messages call it.
        container: Name of its container.
        loaded: Its records, where they were all loaded to tell its format.
    """

    path: Path
    name: str
    container: str
    loaded: tuple[Record, ...] | None = field(default=None, compare=False, repr=False)


def json_lines(file: DumpFile) -> Iterator[Record]:
    """An object per line; blank lines are skipped.

    Raises:
        IngestError: A line is no JSON object.
        OSError: The file cannot be read to its end.
    """
    place = Place(file.name, "Line")
    with _opened(file) as handle:
        # Lines of bytes end at \n alone; lines of text would also end at U+2028, which JSON allows inside a string.
        for number, raw in enumerate(iter(lambda: handle.readline(_LONGEST_LINE + 1), b""), start=1):
            if len(raw) > _LONGEST_LINE:
                place.refuse(number, f"has more than {_LONGEST_LINE >> 20} MiB", "Write a line per sequence.")
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line.strip():
                yield Record(_object(place, number, _parsed(place, number, line)), place, number)


def json_document(file: DumpFile) -> Iterator[Record]:
    """One object, or a list of objects; loaded whole. Lines of objects, which some programs write, are read as such.

    Raises:
        IngestError: It is neither.
        OSError: The file cannot be read to its end.
    """
    place = Place(file.name, "Sample")
    with _opened(file) as handle:
        first = handle.readline(_LONGEST_LINE)
        second = next((line for line in iter(lambda: handle.readline(_LONGEST_LINE), b"") if line.strip()), b"")
        lines = bool(second) and _is_object(first.removeprefix(_BOM))
        rest = b"" if lines else second + handle.read()
    if lines:
        yield from json_lines(file)
        return
    document = _parsed(place, 1, (first + rest).removeprefix(_BOM))
    for number, one in enumerate(document if isinstance(document, list) else [document], start=1):
        yield Record(_object(place, number, one), place, number)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _opened(file: DumpFile) -> IO[bytes]:
    return gzip.open(file.path) if file.path.suffix.lower() == ".gz" else file.path.open("rb")  # type: ignore[return-value]


def _parsed(place: Place, number: int, text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            lists = [key for key, value in pairs if isinstance(value, list)]
            twice = next((key for key in lists if lists.count(key) > 1), "")
            if twice:
                place.refuse(number, f"has the key {quoted(twice)[1:-1]} twice", "Keep one of them.")
        return record

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        place.refuse(number, "is not valid UTF-8", "Save the file as JSON in UTF-8.")
    except IngestError:  # a ValueError too, and already said well
        raise
    except json.JSONDecodeError as error:
        place.refuse(number, f"is not valid JSON ({error.msg}, column {error.colno})", EXAMPLE)
    except (ValueError, RecursionError):
        place.refuse(number, "is JSON that nests too deeply or has a number of thousands of digits", EXAMPLE)


def _object(place: Place, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        place.refuse(number, f"is {kind(value)}, not a JSON object", EXAMPLE)
    return value


def parquet_rows(file: DumpFile) -> Iterator[Record]:
    """A record per row, read in batches; lists of numbers are arrays, a null among floats is NaN.

    Raises:
        IngestError: The file is corrupt, or has a column twice.
        OSError: The file cannot be read to its end.
    """
    place = Place(file.name, "Row")
    first = 1
    with file.path.open("rb") as handle:
        with _arrow_errors(place):
            # Read piece by piece: a file is often one row group, which would else be held as a whole.
            parquet = pq.ParquetFile(handle, buffer_size=_BLOCK, pre_buffer=False)
            names = list(parquet.schema_arrow.names)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            place.refuse_file(f"has the column {quoted(twice[0])[1:-1]} twice", "Keep one of them.")
        batches = _batches(place, parquet)
        while True:
            with _arrow_errors(place):
                batch = next(batches, None)
                columns = {} if batch is None else {name: _values(batch.column(name)) for name in names}
            if batch is None:
                return
            for index in range(batch.num_rows):
                fields = {name: column[index] for name, column in columns.items()}
                yield Record(fields, place, first + index)
            first += batch.num_rows


def _batches(place: Place, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The rows in batches, of fewer rows where these have more values."""
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        values = sum(group.column(number).num_values for number in range(group.num_columns))
        a_row = max(1, values // max(1, group.num_rows))
        if a_row > _LONGEST_ROW:
            place.refuse_file(f"has rows of more than {_LONGEST_ROW:,} values", "Write a row per sequence.")
        yield from file.iter_batches(min(_BATCH_ROWS, max(1, _BATCH_VALUES // a_row)), row_groups=[index])


def _values(column: pa.Array) -> list[Any]:
    """Value by value; a list of numbers without a null, or of floats, is an array."""
    kind_ = column.type
    is_list = any(test(kind_) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
    flat = column.flatten() if is_list else column
    number = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)
    if not is_list or not number or (flat.null_count and not pa.types.is_floating(flat.type)):
        return list(column.to_pylist())
    values = flat.to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    ends = lengths.cumsum()
    there = column.is_valid().to_pylist()
    return [values[end - n : end] if ok else None for n, end, ok in zip(lengths, ends, there, strict=True)]


@contextmanager
def _arrow_errors(place: Place) -> Iterator[None]:
    """Arrow's own words on a broken file, cut and escaped: they can quote the file."""
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError, MemoryError) as error:
        detail = quoted((str(error).splitlines() or [type(error).__name__])[0])
        place.refuse_file(f"is corrupt, truncated or not a Parquet file ({detail})", "Write it again.")


def _pickled(file: DumpFile) -> Iterator[Record]:
    from mismatch_probe.ingest.pickles.files import pickled

    return pickled(file)


def _sqlite_tables(file: DumpFile) -> Iterator[Record]:
    from mismatch_probe.ingest.sqlite import sqlite_tables

    return sqlite_tables(file)


CONTAINERS: Mapping[str, Callable[[DumpFile], Iterator[Record]]] = {
    "jsonl": json_lines,
    "json": json_document,
    "parquet": parquet_rows,
    "torch": _pickled,
    "pickle": _pickled,
    "sqlite": _sqlite_tables,
}
SUFFIXES: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pt": "torch",
    ".pth": "torch",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".dp": "pickle",
    ".db": "sqlite",
    ".sqlite": "sqlite",
}
PICKLES = ("torch", "pickle")
LOADED_WHOLE = ("json", *PICKLES)


def records(file: DumpFile) -> Iterator[Record]:
    """The records of a file: as its container reads them, or those that are loaded.

    Raises:
        IngestError: The file is damaged, or holds something else.
        OSError: It cannot be read to its end.
    """
    return CONTAINERS[file.container](file) if file.loaded is None else iter(file.loaded)
