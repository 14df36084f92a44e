"""Documents of dumps."""

from __future__ import annotations

from typing import Any

from mismatch_probe.results.dump import Dump, Recorded, Source


def make_source(**changes: Any) -> Source:
    """A dump of four sequences of two prompts with both sides."""
    facts: dict[str, Any] = {
        "path": "rollouts.jsonl",
        "format": "generic",
        "written_for": "mismatch-probe",
        "sha256": "0" * 64,
        "keys": ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs"),
        "n_rows": 6,
        "n_left_out": 1,
        "n_empty_responses": 1,
        "n_sequences": 4,
        "n_prompts": 2,
        "n_prompt_tokens": 8,
        "n_tokens": 10,
        "n_masked_tokens": 0,
        "n_masked_sequences": 0,
        "n_empty_prompts": 0,
        "longest_prompt": 2,
        "longest_response": 4,
        "longest_sequence": 6,
        "largest_id": 89,
        "ignored_columns": ("score",),
    }
    return Source(**facts | changes)


def make_dump(*, rollout: bool = True, trainer: bool = True, **changes: Any) -> Dump:
    """`recorded.json` of it; `changes` are to its source."""
    recorded = Recorded(rollout=rollout, trainer=trainer, file=make_source(**changes))
    return Dump(**Dump.stamp(), created="2026-01-01T12:00:00+0000", recorded=recorded)
