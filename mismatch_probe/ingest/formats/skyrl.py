"""SkyRL: the batch of a step. Source: `skyrl/train/dataset/preprocess.py` (07eefd6)."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Batch, at, mapping, step_of, total, whole_row
from mismatch_probe.ingest.formats import dump_format


@dump_format(
    "skyrl",
    project="SkyRL",
    version="07eefd6",
    containers=("pickle", "torch"),
    layouts=(("sequences", "attention_mask", "loss_mask", "response_mask"),),
    sides="both",
    switch="Run SkyRL with trainer.dump_data_batch=true and generator.sampling_params.logprobs=0.",
)
def skyrl(record: Record) -> Iterator[Row]:
    """A row per sequence, which is padded on the left; what runs along responses ends with them. −9999 stays."""
    batch = Batch(record, "sequences")
    ids, attention, sampled = (batch.need(key) for key in ("sequences", "attention_mask", "response_mask"))
    columns = {
        "rollout_logprobs": batch.lists("rollout_logprobs"),
        "trainer_logprobs": batch.lists("action_log_probs"),
        "ref_logprobs": batch.lists("base_action_log_probs"),
        "advantages": batch.lists("advantages"),
        "loss_mask": batch.need("loss_mask"),
    }
    rewards = batch.lists("rewards")
    held = mapping(record.fields.get("metadata")).get("uids")
    names = list(held) if isinstance(held, list | tuple) and len(held) == batch.n else []
    for index in range(batch.n):
        row = whole_row(record, ids[index], attention[index], sampled[index], at(columns, index))
        name = {"prompt_id": names[index]} if names and type(names[index]) in (str, int) else {}
        yield {**row, **name, **total(rewards, index), **step_of(record, r"global_step_(\d+)")}
