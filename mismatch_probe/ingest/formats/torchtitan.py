"""torchtitan's RL experiment: `rollout_samples.jsonl`, a line per rollout with its turns.

Read from `torchtitan/experiments/rl/rollout_recorder.py`. A turn has its whole prompt; ids and log-probs are written
only where both are switched on. The versions are the oldest and the newest weights of a turn: a turn that spans several
counts with its oldest. By default only the rollouts with the highest and the lowest reward of a group are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.turns import Turn, rows_with, turn_of

_KEYS = ("prompt_token_ids", "completion_token_ids", "completion_logprobs")
_SWITCH = "Set log_tensors=True and log_logprobs=True in RolloutSampleRecorder.Config."


@dump_format(
    "torchtitan",
    project="torchtitan",
    version="0.2.2, experiments/rl",
    containers=("jsonl",),
    layouts=(("turns", "rollout_id", "group_id"), _KEYS),
    switch=_SWITCH,
    sides="rollout",
)
def torchtitan(record: Record) -> Iterator[Row]:
    """A rollout, or a single turn of one."""
    parts = record.each("turns") if "turns" in record.fields else [record]
    turns = [_turn(part, number) for number, part in enumerate(parts)]
    validation = record.fields.get("is_validation")
    advantage = record.fields.get("advantage")
    yield from rows_with(
        turns,
        reward=record.fields.get("reward"),
        advantages=math.nan if advantage is None else advantage,
        finish_reason=record.fields.get("status"),
        tags=None if validation is None else "validation" if validation else "training",
    )


def _turn(record: Record, number: int) -> Turn:
    if record.fields.get(_KEYS[0]) is None or record.fields.get(_KEYS[1]) is None:
        record.refuse(f"has a turn without {_KEYS[0]} or {_KEYS[1]}", _SWITCH)
    return turn_of(record, _KEYS, number, version="min_policy_version")
