"""open-instruct: rollouts of GRPO, `<run>_rollouts_NNNNNN.jsonl`, a line per sample.

Read from `open_instruct/rl_utils.py` (`RolloutRecord`). `logprobs` are vLLM's along the response, or null; those of a
tool's tokens are placeholders, and no mask is written. `<run>_metadata.jsonl` names the run, the commit and the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import PROMPT, RESPONSE


@dump_format(
    "open-instruct",
    project="open-instruct",
    version="of 2026-08-20",
    containers=("jsonl",),
    layouts=(("prompt_tokens", "response_tokens", "sample_idx"), ("prompt_tokens", "response_tokens", "prompt_idx")),
    beside=("_metadata.jsonl",),
    switch="Pass --save_traces --rollouts_save_path DIR.",
    sides="rollout, or neither",
)
def open_instruct(record: Record) -> Iterator[Row]:
    """A sample."""
    yield {
        PROMPT: record.need("prompt_tokens"),
        RESPONSE: record.need("response_tokens"),
        "rollout_logprobs": record.fields.get("logprobs"),
        "step": record.need("step"),
        "reward": record.fields.get("reward"),
        "advantages": record.fields.get("advantage"),
        "finish_reason": record.fields.get("finish_reason"),
        "tags": record.fields.get("dataset"),
    }
