"""JSON Lines: an object per line, read line by line, each line's lists turned into arrays at once."""

from __future__ import annotations

import hashlib
import json
from typing import IO, Any

import numpy as np

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest import reader
from mismatch_probe.ingest.base import TEXT_KEYS, Place, RecordedRun, kind, missing_key
from mismatch_probe.ingest.collect import IDS, KEYS, LARGEST_ID, LISTS, LOGPROBS, SCALARS, Chunk, Collector, Lists

_EXAMPLE = 'Write for example {"prompt_token_ids": [1, 2], "response_token_ids": [3], "rollout_logprobs": [-0.5]}.'
_BOM = b"\xef\xbb\xbf"
# JSON's types for the elements of each kind of list, and what they should be in words. A bool is an int to Python only.
_INTEGERS: frozenset[type] = frozenset({int})
_NUMBERS: frozenset[type] = frozenset({int, float, type(None)})
_FLAGS: frozenset[type] = frozenset({int, float, bool})
_ELEMENTS: dict[str, tuple[frozenset[type], str]] = {
    **dict.fromkeys(IDS, (_INTEGERS, "an integer")),
    **dict.fromkeys(LOGPROBS, (_NUMBERS, "a number or null")),
    "loss_mask": (_FLAGS, "0 or 1"),
}


@reader(".jsonl")
def read(handle: IO[bytes], name: str) -> RecordedRun:
    """Reads a whole file; blank lines are skipped, and null, NaN, Infinity and -Infinity are log-probs too.

    Args:
        handle: The file, opened in binary at its start.
        name: The path as the user gave it.

    Raises:
        IngestError: A line is not what the format promises.
        OSError: The file cannot be read to its end.
    """
    place = Place(name, "Line")
    collector = Collector(place)
    digest = hashlib.sha256()
    ignored: set[str] = set()
    # Lines of bytes end at \n alone; lines of text would also end at U+2028, which JSON allows inside a string.
    for number, raw in enumerate(handle, start=1):
        digest.update(raw)
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line.strip():
            record = _parse(place, number, line)
            ignored.update(record.keys() - KEYS)
            collector.add(_chunk(place, number, record))
    return collector.finish("jsonl", digest.hexdigest(), ignored)


def _parse(place: Place, number: int, line: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [key for key, _ in pairs]
            for key in KEYS.intersection(names):
                if names.count(key) > 1:
                    place.refuse(number, f"has the key {key} twice", "Keep one of them.")
        return record

    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        place.refuse(number, "is not valid UTF-8", "Save the file as JSON Lines in UTF-8.")
    try:
        record = json.loads(text, object_pairs_hook=unique)
    except IngestError:  # a ValueError too, and already said well
        raise
    except json.JSONDecodeError as error:
        place.refuse(number, f"is not valid JSON ({error.msg}, column {error.colno})", _EXAMPLE)
    except (ValueError, RecursionError):
        place.refuse(number, "is JSON that nests too deeply or has a number of thousands of digits", _EXAMPLE)
    if not isinstance(record, dict):
        place.refuse(number, f"is {kind(record)}, not a JSON object", _EXAMPLE)
    return record


def _chunk(place: Place, number: int, record: dict[str, Any]) -> Chunk:
    for key in IDS:
        if record.get(key) is None:
            text = any(_is_text(record.get(name), str, dict) for name in TEXT_KEYS)
            place.refuse(number, *missing_key(key, record, text))
    lists = {key: _lists(place, number, key, record[key]) for key in LISTS if record.get(key) is not None}
    scalars = {key: [record[key]] for key in SCALARS if key in record}
    return Chunk(np.array([number]), lists, scalars, record.keys())


def _is_text(value: Any, *elements: type) -> bool:
    """Whether it is a text, or a list whose first element is of one of these types, as chat messages are."""
    return isinstance(value, str) or (isinstance(value, list) and value[:1] != [] and isinstance(value[0], elements))


def _lists(place: Place, number: int, key: str, value: Any) -> Lists:
    if key in IDS and _is_text(value, str):
        place.refuse(number, *missing_key(key, (), text=True))
    if not isinstance(value, list):
        place.refuse(number, f"has {key} that is {kind(value)}, not a list", _EXAMPLE)
    allowed, wanted = _ELEMENTS[key]
    if not allowed.issuperset(map(type, value)):
        index = next(index for index, item in enumerate(value) if type(item) not in allowed)
        shown = value[index] if type(value[index]) is float else kind(value[index])
        place.refuse(number, f"has {shown} as {key}[{index}], which is not {wanted}", _EXAMPLE)
    try:
        # numpy turns None into NaN where it is told to make floats.
        array = np.array(value, np.int64 if key in IDS else np.float64)
    except OverflowError:
        limit = f"0 to {LARGEST_ID}" if key in IDS else "what a float64 holds"
        place.refuse(
            number, f"has a number in {key} that is outside {limit}", "Write the values that the model returned."
        )
    return Lists(array, np.array([len(value)]))
