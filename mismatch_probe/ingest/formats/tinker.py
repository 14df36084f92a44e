"""Tinker: a `Datum`. Sources: `tinker/types/datum.py`, `tinker/types/tensor_data.py` (0.38.0)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import vector, whole_row
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.pickles.classes import fields_of


@dump_format(
    "tinker",
    project="Tinker",
    version="0.38.0",
    containers=("jsonl", "json", "pickle", "torch"),
    layouts=(("model_input", "loss_fn_inputs"), ("model_input", "target_tokens", "logprobs")),
    sides="rollout",
    switch="Write the Datums that forward_backward takes, with their mask.",
)
def tinker(record: Record) -> Iterator[Row]:
    """One row. Targets are the input shifted by one, and everything else belongs to a target."""
    inputs = _keys(record.fields.get("loss_fn_inputs")) or record.fields
    given = {key: _numbers(inputs.get(key)) for key in ("target_tokens", "logprobs", "mask", "weights", "advantages")}
    held = Record({key: value for key, value in given.items() if value is not None}, record.place, record.row)
    if "mask" not in held.fields and "weights" not in held.fields:
        held.refuse("has no mask, which says where its response begins", "Write the mask among the loss_fn_inputs.")
    targets = vector(held, "target_tokens", held.need("target_tokens"))
    first = _tokens(record)
    if len(first) != len(targets) or not np.array_equal(first[1:], targets[:-1]):
        what = f"has {len(targets)} target_tokens that are not its {len(first)} input tokens shifted by one"
        record.refuse(what, "Write the input without its last token, and the targets without the first.")
    mask = vector(held, "mask", held.fields.get("mask", held.fields.get("weights")))
    columns = {
        "rollout_logprobs": vector(held, "logprobs", held.need("logprobs")),
        "advantages": vector(held, "advantages", held.fields["advantages"]) if "advantages" in held.fields else None,
        "loss_mask": mask,
    }
    for key, column in columns.items():
        if column is not None and len(column) != len(targets):
            record.refuse(f"has {len(column)} {key} for {len(targets)} target_tokens", "Write one per target.")
    yield whole_row(record, np.concatenate([first[:1], targets]), None, mask, columns)


def _keys(value: Any) -> Mapping[str, Any]:
    return fields_of(value) or {}


def _numbers(value: Any) -> Any:
    """What a `TensorData` holds, pickled or as JSON; a plain list is left as it is."""
    keys = _keys(value)
    return keys.get("_numpy", keys.get("data")) if keys else value


def _tokens(record: Record) -> Any:
    """The ids of a `ModelInput`, or a plain list of them."""
    given = record.need("model_input")
    chunks = _keys(given).get("chunks")
    if not isinstance(chunks, list | tuple):
        return vector(record, "model_input", given)
    parts = [vector(record, "model_input", _keys(chunk).get("tokens")) for chunk in chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
