"""OpenRLHF: an `Experience`. Source: `openrlhf/trainer/ppo_utils/experience.py` (0.11.2)."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Batch, at, number, whole_row
from mismatch_probe.ingest.formats import dump_format


@dump_format(
    "openrlhf",
    project="OpenRLHF",
    version="0.11.2",
    containers=("torch", "pickle"),
    layouts=(("sequences", "attention_mask", "action_mask", "action_log_probs"),),
    sides="both",
    switch="torch.save the Experiences that RemoteExperienceMaker makes; rollout_log_probs need "
    "--algo.advantage.is_correction_level other than off.",
)
def openrlhf(record: Record) -> Iterator[Row]:
    """A row per sequence; what runs along actions ends with the sequence, whose first token has no action."""
    batch = Batch(record, "sequences")
    ids, attention, masks = (batch.need(key) for key in ("sequences", "attention_mask", "action_mask"))
    columns = {
        "rollout_logprobs": batch.lists("rollout_log_probs"),
        "trainer_logprobs": batch.lists("action_log_probs"),
        "ref_logprobs": batch.lists("base_action_log_probs"),
        "advantages": batch.lists("advantages"),
        "loss_mask": masks,
    }
    rewards = batch.values("rewards")
    for index in range(batch.n):
        row = whole_row(record, ids[index], attention[index], masks[index], at(columns, index))
        yield {**row, **(number(rewards[index]) if rewards else {})}
