"""Records of decoded JSON: one object of metrics, a list of them, a column for each metric, a history."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest

from pydantic import JsonValue

from mismatch_probe.ingest.metric_log import LONGEST_NAME, MOST_NAMES, Reading, Record
from mismatch_probe.metrics.reported import STEPS, find

_DEEPEST = 6
_TOKENS = frozenset(
    {"token_ids", "prompt_token_ids", "response_token_ids", "rollout_logprobs", "generation_logprobs", "logprobs"}
    | {"inference_logprobs", "trainer_logprobs", "prev_logprobs", "response_tokens", "input_ids", "rollout_log_probs"}
)
NUMBER = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,4})?"
"""Pattern of a finite number."""
_NUMBER = re.compile(rf"{NUMBER}|[-+]?(?:nan|inf|infinity)", re.IGNORECASE)


def number(text: str) -> float | None:
    """The number that a text is; None for `None` and `null`.

    Raises:
        ValueError: It is none of these.
    """
    if text in ("None", "null"):
        return None
    if not _NUMBER.fullmatch(text):
        raise ValueError(text[:40])
    return float(text)


def step_of(values: Mapping[str, float | None]) -> float | None:
    """The training step among values."""
    return next((v for name, v in values.items() if name in STEPS and v is not None and math.isfinite(v)), None)


def record(values: Mapping[str, float | None], step: float | None = None) -> Record:
    """A record of values, without the step that is among them."""
    kept = {name: value for name, value in values.items() if name not in STEPS}
    found = step_of(values)
    return Record(kept, step if found is None else found)


def records_of(value: JsonValue, reading: Reading) -> Iterator[Record]:
    """The records of a decoded JSON value."""
    if isinstance(value, list):
        for one in value:
            if isinstance(one, dict):
                yield from records_of(one, reading)
        return
    if not isinstance(value, dict):
        return
    reading.has_tokens |= any(isinstance(value.get(key), list) for key in _TOKENS)
    history = value.get("log_history")
    if isinstance(history, list):
        yield from records_of(history, reading)
        return
    by_step = {name: one for name, one in value.items() if isinstance(one, dict) and _has_steps(one)}
    if by_step and len(by_step) == len(value):
        for name, one in by_step.items():
            yield from (record({name: as_number(v)}, float(step)) for step, v in one.items() if is_number(v))
        return
    columns = {name: one for name, one in value.items() if isinstance(one, list) and (find(name) or name in STEPS)}
    if columns:
        for row in zip_longest(*columns.values()):
            yield record({n: as_number(v) for n, v in zip(columns, row, strict=True) if is_number(v)})
        return
    yield record(flat(value, reading))


def _has_steps(value: dict[str, JsonValue]) -> bool:
    return bool(value) and all(key.isascii() and key.isdigit() and len(key) < 16 for key in value)


def flat(value: Mapping[str, JsonValue], reading: Reading) -> dict[str, float | None]:
    """Every number of nested objects under its path, `a/b`; lists and texts are left out."""
    found: dict[str, float | None] = {}
    stack: list[tuple[str, JsonValue, int]] = [("", dict(value), 0)]
    while stack:
        name, one, depth = stack.pop()
        if isinstance(one, dict):
            if depth < _DEEPEST:
                below = [(f"{name}/{key}" if name else key, v, depth + 1) for key, v in one.items()]
                stack.extend(reversed(below))
        elif is_number(one) and len(name) <= LONGEST_NAME:
            if len(found) >= MOST_NAMES:
                reading.damage["names-left-out"] += 1
                break
            found[name] = as_number(one)
    return found


def is_number(value: JsonValue) -> bool:
    """Whether a value is a number, null, or a text that is one, as newer releases of transformers print them."""
    if isinstance(value, str):
        return bool(_NUMBER.fullmatch(value))
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def as_number(value: JsonValue) -> float | None:
    """The number of what `is_number`."""
    if value is None or isinstance(value, dict | list):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
