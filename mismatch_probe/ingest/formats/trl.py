"""TRL: the batch that its trainer generates, and the samples of its asynchronous trainer.

Sources: `trl/trainer/grpo_trainer.py`, `trl/experimental/async_grpo/async_rollout_worker.py` (1.16.0).
"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Batch, at, mapping, number, singles, split_row, vector, whole_row
from mismatch_probe.ingest.formats import dump_format


@dump_format(
    "trl",
    project="TRL",
    version="1.16.0",
    containers=("torch", "pickle"),
    layouts=(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),),
    sides="both",
    switch="Use vLLM (use_vllm=True) and torch.save what GRPOTrainer._generate_and_score_completions returns.",
)
def trl(record: Record) -> Iterator[Row]:
    """A row per completion: prompts padded on the left, completions on the right."""
    batch = Batch(record, "completion_ids")
    prompts, held = batch.need("prompt_ids"), batch.need("prompt_mask")
    ids, masks = batch.need("completion_ids"), batch.need("completion_mask")
    tools = batch.lists("tool_mask")
    columns = {
        "rollout_logprobs": batch.lists("sampling_per_token_logps"),
        "trainer_logprobs": batch.lists("old_per_token_logps"),
        "ref_logprobs": batch.lists("ref_per_token_logps"),
        "loss_mask": masks if tools is None else tools,
    }
    advantages = batch.values("advantages")
    for index in range(batch.n):
        row = split_row(record, (prompts[index], held[index]), (ids[index], masks[index]), at(columns, index))
        yield {**row, **singles({"advantages": advantages}, index)}


@dump_format(
    "trl-async",
    project="TRL",
    version="1.16.0",
    containers=("torch", "pickle"),
    layouts=(("input_ids", "completion_mask", "old_log_probs", "model_version"),),
    sides="rollout",
    switch="Pickle the RolloutSamples that AsyncGRPOTrainer takes off its queue.",
)
def trl_async(record: Record) -> Iterator[Row]:
    """One row; its `old_log_probs` are those of the engine that sampled, not of the trainer."""
    mask = vector(record, "completion_mask", record.need("completion_mask"))
    columns = {
        "rollout_logprobs": vector(record, "old_log_probs", record.need("old_log_probs")),
        "loss_mask": mask,
    }
    row = whole_row(record, vector(record, "input_ids", record.need("input_ids")), None, mask, columns)
    fields = record.fields
    named = {"weight_version": "model_version", "prompt_id": "group_id", "advantages": "advantage"}
    single = {ours: fields[theirs] for ours, theirs in named.items() if type(fields.get(theirs)) in (int, float)}
    yield {**row, **single, **number(mapping(fields.get("metrics")).get("reward"))}
