"""PipelineRL: a packed batch. Source: `pipelinerl/finetune/data.py` (0154929)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Array, Batch, number, vector, whole_row
from mismatch_probe.ingest.formats import dump_format

_NO_LABEL = -100
_COLUMNS = {"rollout_logprobs": "old_logprobs", "ref_logprobs": "ref_logprobs", "advantages": "advantages"}


@dump_format(
    "pipelinerl",
    project="PipelineRL",
    version="0154929",
    containers=("torch", "pickle"),
    layouts=(("input_ids", "labels", "old_logprobs"),),
    sides="rollout, reference",
    switch="torch.save the PipelineBatchEncoding that the trainer takes off its queue.",
)
def pipelinerl(record: Record) -> Iterator[Row]:
    """A row per sequence of each packed row; −100 among the labels marks what was not sampled."""
    batch = Batch(record, "input_ids")
    ids, labels, attention = batch.need("input_ids"), batch.need("labels"), batch.lists("attention_mask")
    columns = {ours: batch.lists(theirs) for ours, theirs in _COLUMNS.items()}
    rewards, packed = batch.lists("rewards"), record.fields.get("seq_boundaries") is not None
    version = record.fields.get("model_version")
    for index in range(batch.n):
        for place, (start, end) in enumerate(_parts(record, ids[index])):
            part = slice(start, end)
            label = labels[index][part]
            held = {ours: None if column is None else column[index][part] for ours, column in columns.items()}
            sampled = (label != _NO_LABEL).astype(np.int64)
            row = whole_row(
                record,
                ids[index][part],
                None if packed or attention is None else attention[index],
                sampled,
                held | {"loss_mask": sampled},
            )
            places = np.flatnonzero(sampled)
            reward = number(float(rewards[index][part][places[0]])) if rewards and len(places) else {}
            pack = {"pack_index": place, "pack_id": f"{record.place.name}:{record.row}"} if packed else {}
            yield {**row, **reward, **pack, **({"weight_version": version} if type(version) is int else {})}


def _parts(record: Record, ids: Array) -> Iterator[tuple[int, int]]:
    """Where the sequences of a packed row begin and end; padding behind the last is none."""
    found = record.fields.get("seq_boundaries")
    bounds = [0, len(ids)] if found is None else vector(record, "seq_boundaries", found).tolist()
    if bounds != sorted(bounds) or not bounds or bounds[0] < 0 or bounds[-1] > len(ids):
        record.refuse(f"has seq_boundaries that do not fit its {len(ids)} input_ids", "Write them in order.")
    yield from pairwise(bounds)
