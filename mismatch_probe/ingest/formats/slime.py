"""slime and miles: samples of a rollout, and what the trainer scored of them, in two folders.

Sources: `slime/utils/train_dump_utils.py` (429eb3d) and `miles/utils/train_dump_utils.py` (263d04d). That of format
version 2 was not found: its fields are those that users reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Array, Batch, mapping, number, vector
from mismatch_probe.ingest.containers import DumpFile, records
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import PROMPT, RESPONSE

_ROLLOUT, _TRAIN = "rollout_data", "train_data"
# By key of the trainer's file, the key of the generic format.
_SCORED = {"log_probs": "trainer_logprobs", "ref_log_probs": "ref_logprobs", "advantages": "advantages"}
Scores = dict[int, dict[str, Array]]


def _records(file: DumpFile) -> Iterator[Record]:
    """Files of the trainer are read with the rollout that they belong to, or alone where there is none."""
    for record in records(file):
        if "rollout_id" in record.fields and "samples" in record.fields and "format_version" not in record.fields:
            scored = [one for path in _beside(file, _ROLLOUT, _TRAIN) for one in records(path)]
            yield replace(record, fields={**record.fields, "scored": scored})
        elif not _beside(file, _TRAIN, _ROLLOUT):
            yield record


def _beside(file: DumpFile, folder: str, other: str) -> list[DumpFile]:
    """The files of the same rollout in the folder beside: `<id>.pt`, and `<id>_<rank>.pt` of the trainer."""
    if file.path.parent.name != folder:
        return []
    stem, suffix = file.path.stem.partition("_")[0], file.path.suffix
    there = file.path.parent.parent / other
    found = [path for path in sorted(there.glob(f"{stem}*{suffix}")) if path.stem.partition("_")[0] == stem]
    return [DumpFile(path, str(Path(file.name).parent.parent / other / path.name), file.container) for path in found]


@dump_format(
    "slime",
    project="slime, miles",
    version="429eb3d, 263d04d",
    containers=("torch",),
    layouts=(("rollout_id", "samples"), ("rollout_id", "rollout_data"), ("format_version", "samples")),
    records=_records,
    sides="both",
    switch="Run slime or miles with --dump-details DIR, and with --use-tis or --get-mismatch-metrics for log-probs.",
)
def slime(record: Record) -> Iterator[Row]:
    """A row per sample; log-probs run along the response."""
    if "rollout_data" in record.fields:
        yield from _trained(record)
    elif "format_version" in record.fields:
        record.refuse("has the trainer's log-probs without ids", f"Give the folder that has {_ROLLOUT} and {_TRAIN}.")
    else:
        yield from _sampled(record)


def _sampled(record: Record) -> Iterator[Row]:
    """Samples of the rollout, with the trainer's values joined by index; a sample without them has NaN."""
    files: list[Record] = list(record.fields.get("scored") or ())
    scores: Scores = {}
    for file in files:
        scores |= _scores(file)
    if files and not scores:
        files[0].refuse("has no sample_indices, by which it is joined", f"Give the folder {_TRAIN} alone.")
    names = {name for held in scores.values() for name in held}
    samples = record.need("samples")
    if not isinstance(samples, list | tuple) or not all(isinstance(one, Mapping) for one in samples):
        record.refuse("has samples that are not a list of objects", "Write them as slime does.")
    versioned = any(_version(sample) is not None for sample in samples)
    for number_, sample in enumerate(samples, start=1):
        one = Record(sample, record.place, number_)
        row = _split(one, one.need("tokens"), one.need("response_length"))
        n = len(row[RESPONSE])
        row["loss_mask"] = np.ones(n, np.int64) if sample.get("loss_mask") is None else sample["loss_mask"]
        if sample.get("rollout_log_probs") is not None:
            row["rollout_logprobs"] = sample["rollout_log_probs"]
        held = scores.get(sample["index"], {}) if type(sample.get("index")) is int else {}
        row |= {name: held.get(name, np.full(n, np.nan)) for name in names}
        version = _version(sample)
        row |= {"weight_version": -1 if version is None else version} if versioned else {}
        status = sample.get("status")
        row |= {"finish_reason": status} if type(status) is str else {}
        row |= {"prompt_id": sample["group_index"]} if type(sample.get("group_index")) is int else {}
        yield row | number(sample.get("reward")) | _step(record)


def _scores(record: Record) -> Scores:
    """The trainer's values by index of the sample, of a file of either version."""
    if "rollout_data" not in record.fields:
        samples = record.need("samples")
        found: Scores = {}
        for sample in samples if isinstance(samples, list | tuple) else ():
            index = mapping(sample).get("sample_index")
            if type(index) is int:
                found[index] = {
                    ours: vector(record, name, sample[name])
                    for name, ours in _SCORED.items()
                    if sample.get(name) is not None
                }
        return found
    data = mapping(record.fields["rollout_data"])
    indices = data.get("sample_indices")
    if indices is None or data.get("log_probs") is None:
        return {}
    batch = Batch(replace(record, fields=data), "log_probs")
    columns = {ours: batch.lists(name) for name, ours in _SCORED.items()}
    listed = vector(record, "sample_indices", indices).tolist()
    return {
        int(index): {ours: column[place] for ours, column in columns.items() if column is not None}
        for place, index in enumerate(listed[: batch.n])
    }


def _trained(record: Record) -> Iterator[Row]:
    """What the trainer had: both sides in one file."""
    data = replace(record, fields=mapping(record.fields["rollout_data"]))
    batch = Batch(data, "tokens")
    ids, lengths = batch.need("tokens"), vector(data, "response_lengths", data.need("response_lengths")).tolist()
    masks, rewards = batch.lists("loss_masks"), batch.values("rewards")
    columns = {ours: batch.lists(name) for name, ours in _SCORED.items()} | {
        "rollout_logprobs": batch.lists("rollout_log_probs")
    }
    if len(lengths) != batch.n:
        record.refuse(f"has {len(lengths)} response_lengths for {batch.n} sequences", "Write one per sequence.")
    for index in range(batch.n):
        row = _split(data, ids[index], lengths[index])
        row |= {ours: column[index] for ours, column in columns.items() if column is not None}
        row |= {} if masks is None else {"loss_mask": masks[index]}
        yield row | (number(rewards[index]) if rewards else {}) | _step(record)


def _split(record: Record, tokens: Any, length: Any) -> dict[str, Any]:
    ids = vector(record, "tokens", tokens)
    if type(length) is not int or not 0 <= length <= len(ids):
        record.refuse(f"has a response_length that does not fit its {len(ids)} tokens", "Write both as slime does.")
    start = len(ids) - length
    return {PROMPT: ids[:start], RESPONSE: ids[start:]}


def _step(record: Record) -> dict[str, int]:
    step = record.fields.get("rollout_id")
    return {"step": step} if type(step) is int else {}


def _version(sample: Mapping[str, Any]) -> int | None:
    """The one version of the weights that sampled it; which tokens several sampled is not recorded."""
    versions = sample.get("weight_versions")
    said = {str(one) for one in versions} if isinstance(versions, list | tuple) else set()
    only = said.pop() if len(said) == 1 else ""
    return int(only) if only.isdecimal() and len(only) < 19 else None
