"""Padded batches as rows: what readers of tensors share.

A batch comes as `[B, T]` arrays, or as lists of `B` arrays of their own lengths. Padding is layout and is cut; values
inside a response stay as they are, whatever they are.

Shape legend: `B` sequences, `T` positions of a padded sequence, `n` tokens of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import Record, Row, kind
from mismatch_probe.ingest.keys import PROMPT, RESPONSE

Array = NDArray[Any]


def vector(record: Record, key: str, value: Any) -> Array:
    """A list of numbers as a 1-D array; null is NaN.

    Raises:
        IngestError: It is something else.
    """
    if isinstance(value, list | tuple) and all(type(one) in (int, float, bool, type(None)) for one in value):
        whole = all(type(one) in (int, bool) for one in value)
        try:
            value = np.array(value, np.int64 if whole else np.float64)
        except OverflowError:
            record.refuse(f"has a number in {key} that is outside 64 bits", "Write the values that the model returned.")
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "biuf":
        record.refuse(f"has {key} that is {_shape_of(value)}, not a list of numbers", f"Write {key} as numbers.")
    return value


def _shape_of(value: Any) -> str:
    return f"{value.ndim}-dimensional {value.dtype}" if isinstance(value, np.ndarray) else kind(value)


class Batch:
    """A record of several sequences.

    Args:
        record: The record.
        key: A key that every batch has, whose first axis is that of the sequences.
    """

    def __init__(self, record: Record, key: str) -> None:
        self.record = record
        self._key = key
        self.n = len(_split(record, key, record.need(key)))

    def lists(self, key: str) -> list[Array] | None:
        """Per sequence, a 1-D array; None where the key is not there.

        Raises:
            IngestError: It holds something else, or another number of sequences.
        """
        value = self.record.fields.get(key)
        if value is None:
            return None
        found = _split(self.record, key, value)
        if len(found) != self.n:
            what = f"has {key} of {len(found)} sequences and {self._key} of {self.n}"
            self.record.refuse(what, f"Write {key} of every sequence.")
        return found

    def need(self, key: str) -> list[Array]:
        """Per sequence, a 1-D array.

        Raises:
            IngestError: The key is not there, or holds something else.
        """
        self.record.need(key)
        return self.lists(key) or []

    def values(self, key: str) -> list[Any] | None:
        """Per sequence, a single value; None where the key is not there or holds no single values."""
        value = self.record.fields.get(key)
        if isinstance(value, np.ndarray):
            value = value.reshape(len(value), -1) if value.ndim > 1 and len(value) else value
            value = value[:, 0] if value.ndim > 1 and value.shape[1] == 1 else value
            value = value.tolist() if value.ndim == 1 else None
        if not isinstance(value, list | tuple) or len(value) != self.n:
            return None
        return list(value) if all(type(one) in (int, float, str, bool) for one in value) else None


def _split(record: Record, key: str, value: Any) -> list[Array]:
    if isinstance(value, np.ndarray) and value.ndim == 2:
        value = list(value)
    elif isinstance(value, np.ndarray) or not _nested(value):
        value = [value]
    return [vector(record, key, one) for one in value]


def _nested(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, list | tuple | np.ndarray) for one in value)


def whole_row(
    record: Record, ids: Array, attention: Array | None, sampled: Array, columns: Mapping[str, Array | None]
) -> Row:
    """A row of a padded whole sequence, cut to what is not padding.

    Args:
        record: The record.
        ids: `[T]` int.
        attention: `[T]`, not 0 where no padding is; None without padding.
        sampled: Not 0 at the tokens of the response; the first of them begins it. It ends with the sequence.
        columns: By key of the generic format, values that end with the sequence: the last belongs to the last id. So a
            `[T - 1]` column, which has none for the first id, and one of the last `A` positions, are both right.

    Raises:
        IngestError: Something is longer than the sequence, or does not reach to its response.
    """
    n = len(ids)
    real = np.ones(n, bool) if attention is None else attention != 0
    if len(real) != n:
        record.refuse(f"has {len(real)} attention_mask for {n} ids", "Write one 0 or 1 per id.")
    if len(sampled) > n:
        record.refuse(f"has a mask of {len(sampled)} for {n} ids", "Write at most one value per id.")
    places = np.flatnonzero(real)
    begin, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
    hits = np.flatnonzero(sampled[: max(0, end - n + len(sampled))]) + n - len(sampled)
    hits = hits[hits >= begin]
    start = int(hits[0]) if len(hits) else end
    row: dict[str, Any] = {PROMPT: ids[begin:start], RESPONSE: ids[start:end]}
    for key, column in columns.items():
        if column is None:
            continue
        offset = n - len(column)
        if offset < 0 or (start < end and start < offset):
            record.refuse(
                f"has {len(column)} {key} for a response that begins at {start} of {n} ids",
                "Write one value per token of the response.",
            )
        row[key] = column[max(0, start - offset) : max(0, end - offset)]
    return row


def split_row(
    record: Record,
    prompt: tuple[Array, Array | None],
    response: tuple[Array, Array | None],
    columns: Mapping[str, Array | None],
) -> Row:
    """A row of a padded prompt and a padded response, each with its mask; a mask of None stands for no padding.

    The response ends with the last 1 of its mask; `columns` run along it.

    Raises:
        IngestError: Something has another length.
    """
    ids, mask = response
    pieces = {"prompt": prompt, "response": response}
    for name, (values, held) in pieces.items():
        if held is not None and len(held) != len(values):
            record.refuse(f"has a {name} mask of {len(held)} for {len(values)} ids", "Write one 0 or 1 per id.")
    places = np.flatnonzero(mask) if mask is not None else np.arange(len(ids))
    end = int(places[-1]) + 1 if len(places) else 0
    kept = prompt[0] if prompt[1] is None else prompt[0][prompt[1] != 0]
    row: dict[str, Any] = {PROMPT: kept, RESPONSE: ids[:end]}
    for key, column in columns.items():
        if column is not None and len(column) != len(ids):
            record.refuse(f"has {len(column)} {key} for {len(ids)} ids", "Write one value per token of the response.")
        row |= {} if column is None else {key: column[:end]}
    return row


def at(columns: Mapping[str, Sequence[Array] | None], index: int) -> dict[str, Array | None]:
    """The columns of one sequence."""
    return {key: None if column is None else column[index] for key, column in columns.items()}


def singles(columns: Mapping[str, Sequence[Any] | None], index: int) -> dict[str, Any]:
    """The single values of one sequence, those that are there."""
    return {key: column[index] for key, column in columns.items() if column is not None}


def step_of(record: Record, pattern: str) -> dict[str, int]:
    """The step that the path of its file says; `pattern` has one group, of digits."""
    said = re.search(pattern, record.place.name.replace("\\", "/"))
    return {"step": int(said[1])} if said and len(said[1]) < 19 else {}


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a dict, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def total(column: Sequence[Array] | None, index: int) -> dict[str, float]:
    """A reward that is given per token: its sum."""
    return {} if column is None else number(float(np.sum(column[index], dtype=np.float64)))


def number(value: Any) -> dict[str, float]:
    """A reward, where it is a number."""
    return {"reward": float(value)} if type(value) in (int, float, bool) and abs(value) < 1e300 else {}
