"""Dumps of text: nothing can be said of their tokens, since encoding text again can give other ids than were sampled.

Read from verl 0.8 and 0.9 (`_dump_generations`, which decodes without special tokens), TRL 1.10
(`GRPOTrainer.log`), AReaL 1.0 (`areal/infra/workflow_executor.py`) and NeMo-RL 0.6 (`distillation.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import dump_format

_WHY = "it holds text without token ids, and encoding it again can give other ids than were sampled"


@dump_format(
    "verl-text",
    project="verl",
    version="0.9",
    containers=("jsonl",),
    layouts=(("input", "output", "score", "step"),),
    switch="Set actor_rollout_ref.rollout.calculate_log_probs=true and save the batch with DataProto.save_to_disk: it "
    "has prompts, responses, response_mask, rollout_log_probs and old_log_probs.",
    refusal=_WHY,
)
@dump_format(
    "trl-text",
    project="TRL",
    version="1.10",
    containers=("parquet",),
    layouts=(("step", "prompt", "completion", "advantage"),),
    switch="Override GRPOTrainer._generate_and_score_completions and save prompt_ids, completion_ids, completion_mask, "
    "sampling_per_token_logps and old_per_token_logps.",
    refusal=_WHY,
)
@dump_format(
    "areal-text",
    project="AReaL",
    version="1.0",
    containers=("jsonl",),
    layouts=(("task_id", "sample_idx", "prompt", "completion"), ("head_version", "prompt", "completion")),
    switch="Save the trajectory that the workflow returns: it has input_ids, loss_mask, logprobs and versions.",
    refusal=_WHY,
)
@dump_format(
    "nemo-rl-text",
    project="NeMo-RL",
    version="0.6",
    containers=("jsonl",),
    layouts=(("content", "input_lengths", "idx"),),
    switch="Distillation writes no ids; its GRPO writes token_ids, generation_logprobs and prev_logprobs.",
    refusal=_WHY,
)
def text_only(record: Record) -> Iterator[Row]:
    """Nothing."""
    record.refuse("holds text alone", "Record prompt_token_ids and response_token_ids.")
