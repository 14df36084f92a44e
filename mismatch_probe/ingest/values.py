"""Values of a row as arrays: what JSON, numpy or another container has under a key of the generic format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import TEXT_KEYS, Record, Row, kind, missing_key
from mismatch_probe.ingest.keys import IDS, KEYS, LENGTH, NAMED, PER_TOKEN, PROMPT, RESPONSE, WHOLE, Key

EXAMPLE = 'Write for example {"prompt_token_ids": [1, 2], "response_token_ids": [3], "rollout_logprobs": [-0.5]}.'
LARGEST_ID = int(np.iinfo(np.int32).max)
_RANGE = {"ids": f"0 to {LARGEST_ID}", "integer": "64 bits"}
# JSON's types for the elements of each kind of list, and what they should be in words. A bool is an int to Python only.
_INTEGERS: frozenset[type] = frozenset({int})
_NUMBERS: frozenset[type] = frozenset({int, float, type(None)})
_FLAGS: frozenset[type] = frozenset({int, float, bool})
_ELEMENTS: dict[str, tuple[frozenset[type], str, str]] = {
    "ids": (_INTEGERS, "an integer", "iu"),
    "integer": (_INTEGERS, "an integer", "iu"),
    "logprob": (_NUMBERS, "a number or null", "fiu"),
    "number": (_NUMBERS, "a number or null", "fiu"),
    "mask": (_FLAGS, "0 or 1", "fiub"),
}


def split(record: Record, row: Row) -> Row:
    """A row with prompt and response; what runs along a whole sequence is cut to the response.

    Raises:
        IngestError: The row has neither, or nothing says where its response begins.
    """
    if row.get(WHOLE) is None or row.get(RESPONSE) is not None:
        return row
    ids = list_of(record, WHOLE, row[WHOLE])
    start = row.get(LENGTH)
    if start is None and row.get("loss_mask") is not None:
        mask = list_of(record, "loss_mask", row["loss_mask"])
        if len(mask) == len(ids):
            start = int(np.argmax(mask)) if mask.any() else len(ids)
    if isinstance(start, bool) or not isinstance(start, int | np.integer) or not 0 <= start <= len(ids):
        record.refuse(
            f"has {WHOLE}, and nothing says where the response begins",
            f"Write {LENGTH}, or a loss_mask along all the tokens.",
        )
    cut = {PROMPT: ids[:start], RESPONSE: ids[start:]}
    for name, value in row.items():
        if name in PER_TOKEN and hasattr(value, "__len__") and len(value) == len(ids):
            cut[name] = value[start:]
        elif name not in (WHOLE, LENGTH):
            cut[name] = value
    return cut


def list_of(record: Record, name: str, value: Any) -> NDArray[Any]:
    """A list as an array: int64 of ids, integers and masks, float64 of log-probs and numbers, whose null is NaN.

    Raises:
        IngestError: It is not a list, or an element is of another kind.
    """
    key = KEYS.get(name, KEYS[RESPONSE])
    types, wanted, kinds = _ELEMENTS[key.kind]
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in kinds:
            record.refuse(f"has {name} of the type {value.dtype}, {value.ndim}-dimensional", f"Write {wanted} a token.")
        if key.kind == "integer" and value.dtype == np.uint64 and value.max(initial=0) >= 2**63:
            record.refuse(f"has a number in {name} that is outside 64 bits", "Write the values as integers of 64 bits.")
        return value.astype(np.float64) if key.kind in ("logprob", "number") else value
    if key.kind == "ids" and is_text(value, str):
        record.refuse(*missing_key(name, (), text=True))
    if not isinstance(value, list | tuple):
        record.refuse(f"has {name} that is {kind(value)}, not a list", EXAMPLE)
    if not types.issuperset(map(type, value)):
        index = next(index for index, item in enumerate(value) if type(item) not in types)
        shown = value[index] if type(value[index]) is float else kind(value[index])
        record.refuse(f"has {shown} as {name}[{index}], which is not {wanted}", EXAMPLE)
    try:
        # numpy turns None into NaN where it is told to make floats.
        return np.array(value, np.float64 if key.kind in ("logprob", "number", "mask") else np.int64)
    except OverflowError:
        limit = _RANGE.get(key.kind, "what a float64 holds")
        record.refuse(f"has a number in {name} that is outside {limit}", "Write the values that the model returned.")


def per_token(record: Record, key: Key, value: Any, n: int) -> NDArray[Any]:
    """A value per response token; a single one stands for all `n` tokens of the row."""
    single = key.kind in ("integer", "number") and isinstance(value, int | float | np.number) and value is not True
    return np.repeat(list_of(record, key.name, [value]), n) if single else list_of(record, key.name, value)


def label(record: Record, name: str, value: Any) -> str:
    """A name: text, or an integer, which is written out, or a list of these, which are joined.

    Raises:
        IngestError: It is something else, or text that cannot be encoded.
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple) and not any(isinstance(one, list | tuple) for one in value):
        return ", ".join(label(record, name, one) for one in value)
    if type(value) not in (str, int):
        record.refuse(f"has a {name} that is {kind(value)}", f"Write {name} as text.")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        # JSON can spell half of a surrogate pair, which no table takes.
        record.refuse(f"has a {name} with an unpaired surrogate escape", "Write the character or both surrogates.")
    return text


def per_row(record: Record, key: Key, value: Any) -> int | float | str | None:
    """A single value of a row.

    Raises:
        IngestError: It is of another kind.
    """
    if value is None:
        return None
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if key.kind == "label":
        return label(record, key.name, value)
    if key.kind == "integer":
        if type(value) is not int or not -(2**63) <= value < 2**63:
            article = "an" if key.name[0] in "aeiou" else "a"
            record.refuse(
                f"has {article} {key.name} that is {kind(value)}, not a 64-bit integer",
                f"Write the {key.name} as an integer.",
            )
        return value
    if type(value) not in (int, float):
        record.refuse(f"has a {key.name} that is {kind(value)}", f"Write {key.name} as a number.")
    try:
        return float(value)
    except OverflowError:
        record.refuse(f"has a {key.name} that is outside what a float64 holds", f"Write the {key.name} as a float64.")


def require_ids(record: Record, row: Row) -> None:
    """Checks that a row has both lists of ids.

    Raises:
        IngestError: One is missing.
    """
    for name in IDS:
        if row.get(name) is None:
            text = any(is_text(record.fields.get(other), str, dict) for other in TEXT_KEYS)
            record.refuse(*missing_key(name, record.fields, text))


def is_text(value: Any, *elements: type) -> bool:
    """Whether it is a text, or a list whose first element is of one of these types, as chat messages are."""
    return isinstance(value, str) or (isinstance(value, list) and value[:1] != [] and isinstance(value[0], elements))


def plain(fields: Mapping[str, Any]) -> Row:
    """The keys of the generic format among a record's."""
    return {name: value for name, value in fields.items() if name in NAMED}
