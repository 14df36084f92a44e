"""verl: the batch that its `RolloutSkip` keeps. Sources: `verl/utils/skip/rollout_skip.py`, `verl/protocol.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.batches import Array, Batch, at, mapping, singles, split_row, step_of, total
from mismatch_probe.ingest.formats import dump_format

_STEP = r"(?:^|/)(?:genstep_)?(\d+)/(?:\d+/)?(?:gen_batch\.dp|tq_batch\.pt)$"
_COLUMNS = {
    "rollout_logprobs": "rollout_log_probs",
    "trainer_logprobs": "old_log_probs",
    "ref_logprobs": "ref_log_prob",
    "trainer_entropy": "entropys",
    "advantages": "advantages",
    "loss_mask": "response_mask",
}


@dump_format(
    "verl",
    project="verl",
    version="0.9.1",
    containers=("pickle", "torch"),
    layouts=(
        ("prompts", "responses", "response_mask"),
        ("prompts", "responses", "attention_mask"),
        ("tensordict", "tags", "keys", "global_steps"),
    ),
    beside=("/new_batch.dp",),
    sides="rollout; both where old_log_probs is kept",
    switch="Run verl with skip.rollout.enable=True, skip.rollout.dump_dir=DIR and "
    "actor_rollout_ref.rollout.calculate_log_probs=True. DIR has to be empty: a step that lies there is loaded "
    "in place of sampling.",
)
def verl(record: Record) -> Iterator[Row]:
    """A row per response: prompts padded on the left, responses on the right; or nested tensors without padding."""
    step = step_of(record, _STEP)
    for held in (record.fields.get("global_steps"), mapping(record.fields.get("meta_info")).get("global_steps")):
        step = {"step": held} if type(held) is int else step
    if "tensordict" in record.fields:
        record = replace(record, fields=mapping(record.fields["tensordict"]))
    batch = Batch(record, "responses")
    prompts, responses = batch.need("prompts"), batch.need("responses")
    attention = batch.lists("attention_mask")
    columns = {ours: batch.lists(theirs) for ours, theirs in _COLUMNS.items()}
    masks, padded = columns["loss_mask"], isinstance(record.fields["responses"], np.ndarray)
    single = {"prompt_id": batch.values("uid"), "tags": batch.values("data_source")}
    scores = batch.lists("token_level_scores") or batch.lists("rm_scores")
    for index in range(batch.n):
        before, during = _masks(
            record, prompts[index], responses[index], None if attention is None else attention[index]
        )
        if during is None and padded and masks is not None:
            during = masks[index]
        row = split_row(record, (prompts[index], before), (responses[index], during), at(columns, index))
        yield {**row, **singles(single, index), **total(scores, index), **step}


def _masks(record: Record, prompt: Array, response: Array, mask: Array | None) -> tuple[Array | None, Array | None]:
    """The mask of prompt and response as that of each."""
    if mask is None:
        return None, None
    if len(mask) != len(prompt) + len(response):
        what = f"has {len(mask)} attention_mask for {len(prompt)} prompts and {len(response)} responses"
        record.refuse(what, "Write one value per id of both.")
    return mask[: len(prompt)], mask[len(prompt) :]
