"""martingale: its ledger of tokens. Sources: `martingale/record/{store,tokens,bits}.py`, as of November 2026."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Place, Record, Row
from mismatch_probe.ingest.batches import Array, number
from mismatch_probe.ingest.containers import DumpFile
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import PROMPT, RESPONSE
from mismatch_probe.ingest.sqlite import opened, rows, tables

_TABLES = ("llm_revisions", "sequences", "scores")
_BITS = {"f32": (">f", 8), "f64": (">d", 16)}
_SCORES = "SELECT position, train_revision_digest, record_json FROM scores WHERE sequence_digest = ? ORDER BY rowid"
_FIX = "Write the ledger as martingale does."


def _records(file: DumpFile) -> Iterator[Record]:
    """A record per sequence, with its scores; both streamed."""
    place = Place(file.name, "Sequence")
    with opened(file, place) as database:
        found = tables(database)
        missing = [name for name in _TABLES if name not in found]
        if missing:
            place.refuse_file(f"has no table {missing[0]}, which martingale writes", _FIX)
        steps = dict(rows(database, "SELECT digest, step FROM llm_revisions"))
        scored = next(rows(database, "SELECT 1 FROM scores LIMIT 1"), None) is not None
        query = "SELECT digest, record_json FROM sequences ORDER BY actor_id, sequence_index"
        for row, (digest, text) in enumerate(rows(database, query), start=1):
            held = list(rows(database, _SCORES, digest)) if scored else None
            fields = _object(Record({}, place, row), text)
            yield Record({**fields, "scores": held, "steps": steps}, place, row)


@dump_format(
    "martingale",
    project="martingale",
    version="as of November 2026",
    containers=("sqlite",),
    layouts=(_TABLES,),
    records=_records,
    sides="both; prompts by digest alone",
    switch="Record with martingale's TokenLedger, and score with append_scores.",
)
def martingale(record: Record) -> Iterator[Row]:
    """One row. Prompts are not kept, only their digest, so nothing can be scored again.

    Of several scorings the first is read, that of the weights which the trainer had before its update.
    """
    tokens = record.need("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        record.refuse("has tokens that are not a list of objects", _FIX)
    steps: Mapping[str, Any] = record.fields["steps"]
    row: dict[str, Any] = {
        PROMPT: [],
        RESPONSE: [token.get("token_id") for token in tokens],
        "rollout_logprobs": _values(record, [token.get("logprob_bits") for token in tokens]),
        "prompt_id": record.need("prompt_digest"),
        "replica": record.fields.get("actor_id"),
        "weight_version": [_step(record, steps, token.get("revision_digest")) for token in tokens],
    }
    if record.fields.get("reward_bits") is not None:
        row |= number(_value(record, record.fields["reward_bits"]))
    if record.fields["scores"] is not None:
        row["trainer_logprobs"], version = _scored(record, len(tokens))
        row["trainer_version"] = row["step"] = _step(record, steps, version)
    yield row


def _scored(record: Record, n: int) -> tuple[Array, Any]:
    """`[n]` the trainer's log-probs of the first scoring, NaN where it has none, and its weights."""
    values, first = np.full(n, np.nan), None
    positions: list[int] = []
    bits: list[Any] = []
    for position, version, text in record.fields["scores"]:
        first = version if first is None else first
        if version != first:
            continue
        if type(position) is not int or not 0 <= position < n:
            record.refuse(f"has a score outside its {n} tokens", _FIX)
        positions.append(position)
        bits.append(_object(record, text).get("logprob_bits"))
    values[positions] = _values(record, bits)
    return values, first


def _step(record: Record, steps: Mapping[str, Any], digest: Any) -> int:
    """The step of weights; −1 where none scored."""
    step = steps.get(digest) if type(digest) is str else None
    if digest is not None and type(step) is not int:
        record.refuse("names weights that are not in llm_revisions", _FIX)
    return -1 if step is None else step


def _values(record: Record, bits: list[Any]) -> Array:
    """`[n]` floats by their bits, at once where all are of one width."""
    for kind, (layout, width) in _BITS.items():
        start = len(kind) + 1
        if all(type(one) is str and len(one) == start + width and one.startswith(f"{kind}:") for one in bits):
            with contextlib.suppress(ValueError):
                found = bytes.fromhex("".join([one[start:] for one in bits]))
                if 2 * len(found) == width * len(bits):  # white space is no digit
                    return np.frombuffer(found, layout).astype(np.float64)
    return np.array([_value(record, one) for one in bits], np.float64)


def _value(record: Record, bits: Any) -> float:
    """A float by its bits, as `f32:bf800000`."""
    kind, _, digits = bits.partition(":") if type(bits) is str else ("", "", "")
    layout, width = _BITS.get(kind, ("", -1))
    try:
        if len(digits) != width:
            raise ValueError(digits)
        return float(struct.unpack(layout, bytes.fromhex(digits))[0])
    except (ValueError, struct.error):
        record.refuse("has logprob_bits that are not the bits of a float, as f32:bf800000", _FIX)


def _object(record: Record, text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        record.refuse("has a record_json that is not a JSON object", _FIX)
    return found
