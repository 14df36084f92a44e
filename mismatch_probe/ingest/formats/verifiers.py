"""verifiers: token data of rollouts, in its flat form, as steps of a trajectory, and as the message graph of version 1.

Read from `verifiers/legacy/types.py` (`TrajectoryStepTokens`), `verifiers/v1/graph.py` (`MessageNode`), `trace.py` and
`episode.py`; prime-rl writes episodes to `rollouts/step_{N}/…/traces.jsonl`. A path from a root of the graph to a leaf
is a sequence: a node adds tokens to it, `mask` marks those that were sampled, and `logprobs`, `advantages` and
`reference_logprobs` have a value for each of these. A node that several paths share counts in the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import KEYS, LENGTH, WHOLE
from mismatch_probe.ingest.turns import rows_with, turn_of
from mismatch_probe.ingest.values import list_of, per_row

_KEYS = ("prompt_ids", "completion_ids", "completion_logprobs")
_SAMPLED = {"logprobs": "rollout_logprobs", "advantages": "advantages", "reference_logprobs": "ref_logprobs"}
_SWITCH = "Use a client that keeps token ids: with vLLM, return_token_ids and logprobs in the sampling arguments."


@dump_format(
    "verifiers",
    project="verifiers",
    version="0.3",
    containers=("jsonl", "json"),
    layouts=(_KEYS, ("trajectory",), ("nodes", "task"), ("traces", "task")),
    switch=_SWITCH,
    sides="rollout",
)
def verifiers(record: Record) -> Iterator[Row]:
    """A rollout, or all of an episode."""
    if "traces" in record.fields:
        for trace in record.each("traces"):
            yield from _graph(trace, record)
    elif "nodes" in record.fields:
        yield from _graph(record, record)
    else:
        yield from _turns(record)


def _turns(record: Record) -> Iterator[Row]:
    if "trajectory" in record.fields:
        steps = [step for step in record.each("trajectory") if step.fields.get("tokens") is not None]
        if not steps:
            record.refuse("has no step with tokens", _SWITCH)
        parts = [step.inside("tokens") for step in steps]
    else:
        parts = [record]
    turns = [turn_of(part, _KEYS, number, "completion_mask") for number, part in enumerate(parts)]
    yield from rows_with(
        turns,
        reward=record.fields.get("reward"),
        advantages=record.fields.get("advantage"),
        finish_reason=record.fields.get("stop_condition"),
    )


def _graph(trace: Record, episode: Record) -> Iterator[Row]:
    nodes = trace.each("nodes")
    parents = [node.fields.get("parent") for node in nodes]
    for index, parent in enumerate(parents):
        if parent is not None and (type(parent) is not int or not 0 <= parent < index):
            trace.refuse(f"has nodes[{index}] with a parent that is not a node before it", "Write the trace again.")
    common = _common(trace, episode)
    counted: set[int] = set()
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        path = [leaf]
        while (above := parents[path[-1]]) is not None:
            path.append(above)
        row = _path(nodes, path[::-1], counted)
        if row is not None:
            yield {**row, **common}


def _path(nodes: list[Record], path: list[int], counted: set[int]) -> dict[str, Any] | None:
    """A root-to-leaf path as a row; None where all of its samples have been counted, or it has none."""
    ids, masks, counts, turns = [], [], [], []
    values: dict[str, list[Any]] = {ours: [] for ours in _SAMPLED.values()}
    there: set[str] = set()
    for number, index in enumerate(path):
        node = nodes[index]
        tokens = list_of(node, WHOLE, node.fields.get("token_ids") or [])
        mask = list_of(node, "loss_mask", node.fields.get("mask") or []) != 0
        if len(mask) != len(tokens):
            node.refuse(
                f"has nodes[{index}] with {len(mask)} mask for {len(tokens)} token_ids", "Write a flag a token."
            )
        ids.append(tokens)
        masks.append(mask)
        counts.append(mask & (index not in counted))
        turns.append(np.full(len(tokens), number, np.int64))
        for theirs, ours in _SAMPLED.items():
            values[ours].append(_spread(node, index, theirs, ours, mask))
            there |= {ours} if node.fields.get(theirs) else set()
    sampled, count = np.concatenate(masks), np.concatenate(counts)
    counted.update(index for index, mask in zip(path, masks, strict=True) if mask.any())
    if not count.any():
        return None
    row: dict[str, Any] = {ours: np.concatenate(values[ours]) for ours in there}
    row |= {WHOLE: np.concatenate(ids), LENGTH: int(np.flatnonzero(sampled)[0])}
    return row | {"loss_mask": count.astype(np.float64), "turn": np.concatenate(turns)}


def _spread(node: Record, index: int, theirs: str, ours: str, mask: Any) -> Any:
    """Values of the sampled tokens of a node, along all of its tokens."""
    found = node.fields.get(theirs)
    spread = np.full(len(mask), np.nan)
    if found:
        values = list_of(node, ours, found)
        if len(values) != int(mask.sum()):
            node.refuse(
                f"has nodes[{index}] with {len(values)} {theirs} for {int(mask.sum())} sampled tokens",
                "Write a value per sampled token.",
            )
        spread[mask] = values
    return spread


def _common(trace: Record, episode: Record) -> dict[str, Any]:
    """What is said of a trace as a whole."""
    found: dict[str, Any] = {"finish_reason": trace.fields.get("stop_condition")}
    env, run = episode.fields.get("env"), episode.fields.get("run")
    if isinstance(env, dict):
        found["tags"] = env.get("name") or env.get("id")
    if isinstance(run, dict) and isinstance(work := run.get("work"), dict):
        found["step"] = work.get("step")
        policy = work.get("policy")
        # Several versions cannot be told apart by token.
        if isinstance(policy, dict) and policy.get("start") == policy.get("end"):
            found["weight_version"] = policy.get("start")
    rewards = trace.fields.get("rewards")
    parts = [one for one in rewards.values() if isinstance(one, dict)] if isinstance(rewards, dict) else []
    numbers = [per_row(trace, KEYS["reward"], one.get(key, 1.0)) for one in parts for key in ("score", "weight")]
    if numbers:
        scores = [one if isinstance(one, float) else math.nan for one in numbers]
        found["reward"] = sum(score * weight for score, weight in zip(scores[::2], scores[1::2], strict=True))
    return found
