"""ROLL: a `DataProto` of its trainer.

Source: excerpts of its actor worker, as of November 2026. That log-probs are `[B, T - 1]` is reported, not read there.
"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Batch, at, mapping, total, whole_row
from mismatch_probe.ingest.formats import dump_format

_COLUMNS = {
    "rollout_logprobs": "infer_logprobs",
    "trainer_logprobs": "old_log_probs",
    "ref_logprobs": "ref_log_probs",
    "advantages": "advantages",
}


@dump_format(
    "roll",
    project="ROLL",
    version="as of November 2026",
    containers=("pickle", "torch"),
    layouts=(
        ("input_ids", "attention_mask", "response_mask", "infer_logprobs"),
        ("input_ids", "prompt_mask", "response_mask", "old_log_probs"),
    ),
    sides="both",
    switch="Call save_to_disk on the DataProto that ActorWorker.train_step takes, with "
    "enable_old_logprobs_recompute: true for the trainer's.",
)
def roll(record: Record) -> Iterator[Row]:
    """A row per sequence; masks are `[B, T]`, log-probs `[B, T - 1]`, of which the last belongs to the last id."""
    batch = Batch(record, "input_ids")
    ids, attention, sampled = (batch.need(key) for key in ("input_ids", "attention_mask", "response_mask"))
    columns = {ours: batch.lists(theirs) for ours, theirs in _COLUMNS.items()}
    columns["loss_mask"] = batch.lists("final_response_mask") or sampled
    scores = batch.lists("token_level_rewards")
    step = mapping(record.fields.get("meta_info")).get("global_step")
    for index in range(batch.n):
        row = whole_row(record, ids[index], attention[index], sampled[index], at(columns, index))
        yield {**row, **total(scores, index), **({"step": step} if type(step) is int else {})}
