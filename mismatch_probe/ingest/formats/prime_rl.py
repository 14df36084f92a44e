"""prime-rl: the trainer's token export, `token_exports/step_{N}/rank_{r}.jsonl`, a line per sequence.

Read from `src/prime_rl/trainer/rl/token_export.py`, schema version 1. Lists run along the whole sequence, prompt
included, and index i belongs to token i. Values that are not finite are null. A step is complete when it has a file
`STABLE`. Sequences of one micro-batch are one packed row: `micro_sequence_idx` is their place in it. Where the
component weights say that a frozen model wrote a token (`rl_weights` and `ref_kl_weights` 0), no policy sampled it, and
its inference log-prob means nothing: prime-rl leaves it out of its own mismatch KL, and so does the mask here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import Record, Row, kind
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import LENGTH, WHOLE
from mismatch_probe.ingest.values import list_of

SCHEMA_VERSION = 1


@dump_format(
    "prime-rl",
    project="prime-rl",
    version="0.8",
    containers=("jsonl",),
    layouts=(("schema_version", "token_ids", "loss_mask", "micro_sequence_idx"),),
    marker=("step_*/rank_*.jsonl", "STABLE"),
    switch="Set trainer.enable_token_export = true.",
    sides="rollout and trainer",
)
def prime_rl(record: Record) -> Iterator[Row]:
    """A sequence of a micro-batch."""
    version = record.need("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        said = version if type(version) is int else kind(version)
        record.refuse(
            f"has schema_version {said}, and the reader is for {SCHEMA_VERSION}",
            "Use a mismatch-probe that knows it, or name the columns with --map.",
        )
    ids = list_of(record, WHOLE, record.need("token_ids"))
    mask = list_of(record, "loss_mask", record.need("loss_mask"))
    counts = np.flatnonzero(mask)
    step, rank, batch = (record.need(key) for key in ("step", "rank", "micro_step"))
    yield {
        WHOLE: ids,
        LENGTH: int(counts[0]) if len(counts) else len(ids),
        "loss_mask": np.where(_sampled(record, mask), mask, 0.0),
        "rollout_logprobs": record.need("inference_logprobs"),
        "trainer_logprobs": record.need("trainer_logprobs"),
        "trainer_entropy": record.fields.get("entropy"),
        "advantages": record.fields.get("advantages"),
        "step": step,
        "replica": rank,
        "pack_index": record.need("micro_sequence_idx"),
        "pack_id": f"{step}/{rank}/{batch}",
        "tags": record.fields.get("env_name"),
    }


def _sampled(record: Record, mask: NDArray[Any]) -> NDArray[np.bool_]:
    """`[n]` which tokens the policy sampled; without component weights those that count."""
    weights = {key: _weights(record, key) for key in ("rl_weights", "ref_kl_weights")}
    rl, ref_kl = weights["rl_weights"], weights["ref_kl_weights"]
    if any(one is not None and len(one) != len(mask) for one in weights.values()):
        record.refuse("has component weights that do not run along its loss_mask", "Write one weight per token.")
    sampled: NDArray[np.bool_] = (mask if rl is None else rl) != 0
    return sampled if ref_kl is None else sampled | (ref_kl != 0)


def _weights(record: Record, key: str) -> NDArray[Any] | None:
    value = record.fields.get(key)
    if value is None:
        return None
    weights = list_of(record, "advantages", value)
    return None if np.isnan(weights).all() else weights
