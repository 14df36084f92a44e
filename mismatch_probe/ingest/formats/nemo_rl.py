"""NeMo-RL: `train_data_step{N}.jsonl` of GRPO and PPO, a line per sample.

Read from `nemo_rl/utils/logger.py` (`log_batched_dict_as_jsonl`), `nemo_rl/algorithms/grpo.py`, `grpo_sync.py` and
`ppo.py`. A line is a batch of one, so every value is a list with one element; older files have the element itself.
Sequences are padded at the right to the longest of their batch. Index i of a list belongs to token i; position 0, which
no model predicts, holds 0.0. With dynamic sampling `rewards` are those of the batch before it was filtered, whose order
is another: `filtered_rewards` belong to the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Record, Row, kind
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import LENGTH, WHOLE
from mismatch_probe.ingest.values import list_of

_STEP = re.compile(r"step_?(\d{1,18})\D*$")
_LISTS = {
    "generation_logprobs": "rollout_logprobs",
    "prev_logprobs": "trainer_logprobs",
    "advantages": "advantages",
}


@dump_format(
    "nemo-rl",
    project="NeMo-RL",
    version="0.6",
    containers=("jsonl",),
    layouts=(("token_ids", "token_loss_mask", "sample_loss_mask"),),
    beside=("val_data_step*.jsonl",),
    switch="Set env.should_log_nemo_gym_responses=false; logger.log_dir says where the files go.",
    sides="rollout and trainer",
)
def nemo_rl(record: Record) -> Iterator[Row]:
    """A sample."""
    ids = list_of(record, WHOLE, _of_one(record.need("token_ids"), True))
    n = _of_one(record.need("input_lengths"))
    if type(n) is not int or not 0 <= n <= len(ids):
        record.refuse(
            f"has input_lengths that is {n if type(n) is int else kind(n)}, for {len(ids)} token_ids",
            "Write how many of the token_ids are no padding.",
        )
    mask = list_of(record, "loss_mask", _of_one(record.need("token_loss_mask"), True))
    counts = np.flatnonzero(mask[:n])
    row: dict[str, Any] = {WHOLE: ids[:n], LENGTH: int(counts[0]) if len(counts) else n}
    alive = _of_one(record.need("sample_loss_mask"))
    if type(alive) not in (int, float, bool) or alive not in (0, 1):
        record.refuse("has a sample_loss_mask that is neither 0 nor 1", "Write whether the sample counts.")
    row["loss_mask"] = _cut(mask if alive else np.zeros_like(mask), ids, n)
    for theirs, ours in _LISTS.items():
        value = _of_one(record.need(theirs), theirs != "advantages")
        row[ours] = _cut(list_of(record, ours, value), ids, n) if isinstance(value, list) else value
    rewards = record.fields.get("filtered_rewards", record.fields.get("rewards"))
    row["reward"] = _of_one(rewards)
    agent = _of_one(record.fields.get("agent_ref"))
    row["tags"] = agent.get("name") if isinstance(agent, dict) else None
    step = _STEP.search(PurePath(record.place.name).stem)
    row["step"] = int(step[1]) if step else None
    yield row


def _of_one(value: Any, is_list: bool = False) -> Any:
    """The value of a batch of one, or the value itself; `is_list` where it is a list of its own."""
    nested = isinstance(value, list) and len(value) == 1 and (not is_list or isinstance(value[0], list))
    return value[0] if nested else value


def _cut(values: Any, ids: Any, n: int) -> Any:
    """A list without its padding; one that does not run along the ids is left for the collector to account for."""
    return values[:n] if len(values) == len(ids) else values
