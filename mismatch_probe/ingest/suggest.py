"""What the keys of an unknown record probably are: a guess from their names and from what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mismatch_probe.ingest.keys import KEYS, PROMPT, RESPONSE, WHOLE

# By key of the generic format, what a name like it holds, the best sign first; logits and losses are neither.
_IDS = {
    PROMPT: r"prompt|input|query|context",
    RESPONSE: r"response|completion|output|generat|action|sampled",
    WHOLE: r"token|sequence|ids",
}
_LOGPROBS = {
    "rollout_prefill_logprobs": r"prefill",
    "ref_logprobs": r"(^|[_./])ref",
    "rollout_logprobs": r"rollout|infer|gener|sampl|behav|vllm|sglang|engine",
    "trainer_logprobs": r"train|learner|actor|policy|new|current|prev|old|hf|model",
}
_SINGLE = {"step": r"step|iteration", "prompt_id": r"prompt_?(id|uid|idx|index)|group|uid", "reward": r"reward|score"}


def suggested_map(fields: Mapping[str, Any]) -> dict[str, str]:
    """By a record's own key, the key of the generic format that it probably is; only keys that need a `--map`."""
    found: dict[str, str] = {}
    for holds, patterns in ((_is_ids, _IDS), (_is_logprobs, _LOGPROBS), (_is_mask, {"loss_mask": r"mask"})):
        for ours, pattern in patterns.items():
            theirs = [name for name, value in fields.items() if name not in found and holds(value)]
            named = [name for name in theirs if re.search(pattern, name.lower())]
            named = [name for name in named if ("mask" in name.lower()) == ("mask" in ours)]
            if named and (ours != WHOLE or RESPONSE not in found.values()):
                found[named[0]] = ours
    for ours, pattern in _SINGLE.items():
        named = [name for name, value in fields.items() if np.isscalar(value) and re.search(pattern, name.lower())]
        if named and named[0] not in found:
            found[named[0]] = ours
    if not found.keys() & set(fields) or not set(found.values()) & {PROMPT, RESPONSE, WHOLE}:
        return {}
    return {theirs: ours for theirs, ours in found.items() if theirs != ours and theirs not in KEYS}


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else []


def _is_ids(value: Any) -> bool:
    values = _numbers(value)
    return bool(values) and all(type(one) is int and one >= 0 for one in values) and max(values) > 1


def _is_logprobs(value: Any) -> bool:
    values = [one for one in _numbers(value) if one is not None]
    numbers = bool(values) and {int, float}.issuperset(map(type, values)) and float in map(type, values)
    return numbers and sum(one <= 0 for one in values) > len(values) / 2


def _is_mask(value: Any) -> bool:
    values = _numbers(value)
    return bool(values) and all(one in (0, 1) for one in values)
