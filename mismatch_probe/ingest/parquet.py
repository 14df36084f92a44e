"""Parquet: read in batches of rows, lists taken as flat values and lengths, never as Python objects per token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mismatch_probe.ingest import reader
from mismatch_probe.ingest.base import TEXT_KEYS, Place, RecordedRun, missing_key, quoted
from mismatch_probe.ingest.collect import IDS, KEYS, LISTS, LOGPROBS, SCALARS, Chunk, Collector, Lists

# Rows per batch: at a thousand tokens a row, some 20 MB of Arrow's buffers.
_BATCH = 256
_BLOCK = 1 << 20


@reader(".parquet")
def read(handle: IO[bytes], name: str) -> RecordedRun:
    """Reads a whole file, one batch of rows after another; a null among log-probs is NaN.

    Args:
        handle: The file, opened in binary at its start; it is read twice, once for its digest.
        name: The path as the user gave it.

    Raises:
        IngestError: The file is corrupt, or not what the format promises.
        OSError: The file cannot be read to its end.
    """
    place = Place(name, "Row")
    collector = Collector(place)
    digest = hashlib.sha256()
    while block := handle.read(_BLOCK):
        digest.update(block)
    handle.seek(0)
    with _arrow_errors(place):
        # Read piece by piece: a file is often one row group, which would else be held as a whole beside its columns.
        file = pq.ParquetFile(handle, buffer_size=_BLOCK, pre_buffer=False)
        schema = file.schema_arrow
        names = list(schema.names)
    _check_schema(place, schema, names)
    first = 1
    for batch in _batches(place, file, [key for key in names if key in KEYS]):
        rows = np.arange(first, first + batch.num_rows)
        first += batch.num_rows
        lists = {key: _lists(place, rows, key, batch.column(key)) for key in LISTS if key in names}
        with _arrow_errors(place):  # text is decoded here, and need not be UTF-8
            scalars = {key: batch.column(key).to_pylist() for key in SCALARS if key in names}
        collector.add(Chunk(rows, lists, scalars, names))
    return collector.finish("parquet", digest.hexdigest(), [name for name in names if name not in KEYS])


@contextmanager
def _arrow_errors(place: Place) -> Iterator[None]:
    """Arrow's own words on a broken file, cut and escaped: they can quote the file."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        detail = quoted((str(error).splitlines() or [type(error).__name__])[0])
        place.refuse_file(f"is corrupt, truncated or not a Parquet file ({detail})", "Write it again.")


def _batches(place: Place, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(batch_size=_BATCH, columns=columns)
    while True:
        with _arrow_errors(place):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _check_schema(place: Place, schema: pa.Schema, names: list[str]) -> None:
    for key in IDS:
        if key not in names:
            text = any(_is_text_or_chat(schema.field(name).type) for name in TEXT_KEYS if names.count(name) == 1)
            place.refuse_file(*missing_key(key, names, text))
    for key in KEYS.intersection(names):
        if names.count(key) > 1:
            place.refuse_file(f"has the column {key} twice", "Keep one of them.")
    for key in LISTS:
        if key in names:
            _check_type(place, key, schema.field(key).type)


def _check_type(place: Place, key: str, data_type: pa.DataType) -> None:
    """An all-null column or list has Arrow's type null, whatever it was meant to hold."""
    if key in IDS and _is_text(data_type):
        place.refuse_file(*missing_key(key, (), text=True))
    tests, wanted = [pa.types.is_integer], "a list of integers"
    if key in LOGPROBS:
        tests, wanted = [pa.types.is_floating, pa.types.is_integer], "a list of floats"
    elif key == "loss_mask":
        tests, wanted = (
            [pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating],
            "a list of booleans or of 0 and 1",
        )
    is_list = any(test(data_type) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
    fits = is_list and any(test(data_type.value_type) for test in (*tests, pa.types.is_null))
    if not fits and not pa.types.is_null(data_type):
        place.refuse_file(
            f"has the type {quoted(str(data_type))} in the column {key}", f"Write {key} as {wanted} in every row."
        )


def _is_text(data_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(data_type) or pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
        return _is_text(data_type.value_type)
    return bool(pa.types.is_string(data_type) or pa.types.is_large_string(data_type))


def _is_text_or_chat(data_type: pa.DataType) -> bool:
    is_list = pa.types.is_list(data_type) or pa.types.is_large_list(data_type)
    return _is_text(data_type) or (is_list and bool(pa.types.is_struct(data_type.value_type)))


def _lists(place: Place, rows: NDArray[np.int64], key: str, column: pa.Array) -> Lists:
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.null()))
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy().astype(np.int64)
    absent = np.flatnonzero(lengths < 0)
    if key in IDS and len(absent):
        place.refuse(int(rows[absent[0]]), f"has null as {key}", f"Write {key} as a list of token ids.")
    values = column.flatten()
    if key not in LOGPROBS and values.null_count:
        index = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        row, position = Lists(np.empty(0), lengths).locate(index)
        place.refuse(int(rows[row]), f"has null as {key}[{position}]", f"Write a value for every element of {key}.")
    return Lists(_array(key, values), lengths)


def _array(key: str, values: pa.Array) -> NDArray[Any]:
    if pa.types.is_null(values.type):
        values = values.cast(pa.float64() if key in LOGPROBS else pa.int32())
    if key in LOGPROBS and pa.types.is_integer(values.type):
        values = values.cast(pa.float64())
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array.astype(np.float32) if array.dtype == np.float16 else array
