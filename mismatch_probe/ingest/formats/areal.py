"""AReaL: trajectories.

Source: excerpts of its PPO actor, as of November 2026, which rolls `logprobs` by one to meet `prox_logp`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Batch, at, number, whole_row
from mismatch_probe.ingest.formats import dump_format


@dump_format(
    "areal",
    project="AReaL",
    version="as of November 2026",
    containers=("torch", "pickle", "jsonl", "json"),
    layouts=(("input_ids", "loss_mask", "logprobs", "versions"),),
    sides="rollout; both where prox_logp is kept",
    switch="torch.save the batch that PPOActor.compute_advantages takes; prox_logp needs actor.recompute_logprob=true.",
)
def areal(record: Record) -> Iterator[Row]:
    """A row per sequence; the first that the loss counts begins the response. The trainer's are shifted by one."""
    batch = Batch(record, "input_ids")
    ids, masks, attention = batch.need("input_ids"), batch.need("loss_mask"), batch.lists("attention_mask")
    columns = {
        "rollout_logprobs": batch.need("logprobs"),
        "weight_version": batch.lists("versions"),
        "loss_mask": masks,
    }
    shifted = {"trainer_logprobs": batch.lists("prox_logp"), "ref_logprobs": batch.lists("ref_logp")}
    columns |= {ours: None if column is None else [one[:-1] for one in column] for ours, column in shifted.items()}
    rewards = batch.values("rewards")
    for index in range(batch.n):
        mask = None if attention is None else attention[index]
        row = whole_row(record, ids[index], mask, masks[index], at(columns, index))
        yield {**row, **(number(rewards[index]) if rewards else {})}
