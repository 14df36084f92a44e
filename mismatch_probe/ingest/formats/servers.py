"""Answers of servers as they came: vLLM and OpenAI's interfaces, vLLM's `RequestOutput`, and SGLang's `/generate`.

Read from vLLM 0.32 (`entrypoints/openai/*/protocol.py`, `entrypoints/scale_out/token_in_token_out/protocol.py`,
`outputs.py`) and SGLang 0.5.23 (`managers/tokenizer_manager.py`, `utils/weight_versions.py`). The prompt's ids are in
the answer where the request asked for them; else a record holds both, as `{"request": …, "response": …}`. vLLM floors
log-probs at -9999 and writes null for NaN. Versions of weights are labels: their last number counts, and -1 where they
have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import Record, Row, kind
from mismatch_probe.ingest.formats import dump_format
from mismatch_probe.ingest.keys import PROMPT, RESPONSE
from mismatch_probe.ingest.values import list_of

_TOKEN = re.compile(r"token_id:(\d{1,10})$")
_LAST_NUMBER = re.compile(r"(\d{1,18})\D*$")
_PROMPTS = ("prompt_token_ids", "input_ids", "token_ids", "prompt")
_VLLM = (
    "Ask for return_token_ids=true and logprobs=1; with /inference/v1/generate keep the request beside the response."
)
_SGLANG = "Ask for return_logprob=true and logprob_start_len=0, or keep the request's input_ids beside the response."


@dump_format(
    "vllm",
    project="vLLM",
    version="0.32",
    containers=("jsonl", "json"),
    layouts=(
        *(("choices", other) for other in ("model", "request_id", "object", "usage", "prompt_token_ids")),
        ("outputs", "prompt_token_ids"),
        ("request", "response"),
    ),
    switch=_VLLM,
    sides="rollout",
)
def vllm(record: Record) -> Iterator[Row]:
    """The choices of an answer."""
    answer, request = _answer(record)
    if "meta_info" in answer.fields:
        yield from sglang(record)
        return
    outputs = "choices" if "choices" in answer.fields else "outputs"
    for choice in answer.each(outputs):
        if "meta_info" in choice.fields:
            yield _sglang_row(choice, answer, request)
            continue
        logprobs = choice.fields.get("logprobs")
        ids = _sampled_ids(choice, logprobs)
        yield {
            PROMPT: _prompt(choice, _VLLM, choice, answer, request),
            RESPONSE: ids,
            "rollout_logprobs": _logprobs(choice, logprobs, ids),
            "weight_version": _versions(choice, choice.fields.get("weight_versions"), len(ids)),
            "finish_reason": choice.fields.get("finish_reason"),
        }


@dump_format(
    "sglang",
    project="SGLang",
    version="0.5.23",
    containers=("jsonl", "json"),
    layouts=(("meta_info", "output_ids"), ("meta_info", "text")),
    switch=_SGLANG,
    sides="rollout",
)
def sglang(record: Record) -> Iterator[Row]:
    """An answer."""
    answer, request = _answer(record)
    yield _sglang_row(answer, answer, request)


def _answer(record: Record) -> tuple[Record, Record]:
    """An answer and its request, which are one record where they were not kept apart."""
    paired = "request" in record.fields and "response" in record.fields
    return (record.inside("response"), record.inside("request")) if paired else (record, record)


def _prompt(record: Record, switch: str, *places: Record) -> Any:
    """The prompt's ids, from the first place that has them; the ids of a choice are those that it sampled."""
    for place in places:
        for key in _PROMPTS:
            value = place.fields.get(key)
            own = key == "token_ids" and place is record
            if isinstance(value, list) and not own and (key != "prompt" or all(type(one) is int for one in value)):
                return list_of(place, PROMPT, value)
    return record.refuse("has no token ids of its prompt", switch)


def _sampled_ids(choice: Record, logprobs: Any) -> Any:
    """The ids of a choice, or those that its log-probs name."""
    if choice.fields.get("token_ids") is not None:
        return list_of(choice, RESPONSE, choice.fields["token_ids"])
    entries = _entries(choice, logprobs)
    tokens = entries or (logprobs.get("tokens") if isinstance(logprobs, Mapping) else None)
    ids = [_id(one) for one in tokens] if isinstance(tokens, list) else []
    if not ids or None in ids:
        choice.refuse("has no token ids of its response", _VLLM)
    return list_of(choice, RESPONSE, ids)


def _id(token: Any) -> int | None:
    if isinstance(token, Mapping):
        number, token = token.get("token_id"), token.get("token")
        if type(number) is int:
            return number
    found = _TOKEN.match(token) if isinstance(token, str) else None
    return int(found[1]) if found else None


def _entries(choice: Record, logprobs: Any) -> list[Mapping[str, Any]]:
    """Per position an object with its log-prob, as the chat interface writes it."""
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if content is None:
        return []
    if not isinstance(content, list) or not all(isinstance(one, Mapping) for one in content):
        choice.refuse(f"has logprobs.content that is {kind(content)}, not a list of objects", _VLLM)
    return content


def _logprobs(choice: Record, logprobs: Any, ids: Any) -> Any:
    """The log-probs of the sampled ids; null where a position has none of its id."""
    if logprobs is None:
        return None
    if isinstance(logprobs, list):
        found = [_of_id(position, token) for position, token in zip(logprobs, ids.tolist(), strict=False)]
        # Positions without an id stay, so that the collector accounts for them.
        return list_of(choice, "rollout_logprobs", found + [None] * (len(logprobs) - len(found)))
    if not isinstance(logprobs, Mapping):
        choice.refuse(f"has logprobs that are {kind(logprobs)}", _VLLM)
    if logprobs.get("token_logprobs") is not None:
        return list_of(choice, "rollout_logprobs", logprobs["token_logprobs"])
    entries = _entries(choice, logprobs)
    return list_of(choice, "rollout_logprobs", [one.get("logprob") for one in entries]) if entries else None


def _of_id(position: Any, token: int) -> Any:
    entry = position.get(str(token)) if isinstance(position, Mapping) else None
    return entry.get("logprob") if isinstance(entry, Mapping) else entry


def _versions(record: Record, spans: Any, n: int) -> Any:
    """`[n]` the weights that sampled each token; None where nothing is said of them."""
    if spans is None:
        return None
    versions = np.full(n, -1, np.int64)
    if not isinstance(spans, list):
        record.refuse(f"has weight_versions that are {kind(spans)}, not a list", "Write a list of spans.")
    for span in spans:
        fields = dict(zip(("version", "start", "end"), span, strict=False)) if isinstance(span, list) else span
        ends = [fields.get(key) for key in ("start", "end")] if isinstance(fields, Mapping) else []
        if len(ends) != 2 or any(type(end) is not int or not 0 <= end < 2**63 for end in ends):
            record.refuse("has weight_versions without version, start and end", "Write a span as the server does.")
        versions[ends[0] : ends[1]] = _version(fields.get("version"))
    return versions


def _version(label: Any) -> int:
    found = _LAST_NUMBER.search(label) if isinstance(label, str) else None
    number = int(found[1]) if found else label
    return number if type(number) is int and 0 <= number < 2**63 else -1


def _sglang_row(record: Record, answer: Record, request: Record) -> Row:
    meta = record.inside("meta_info")
    pairs = _pairs(meta, "output_token_logprobs")
    ids = record.fields.get("output_ids")
    named = None if pairs is None else list_of(meta, RESPONSE, [pair[1] for pair in pairs])
    ids = named if ids is None else list_of(record, RESPONSE, ids)
    if ids is None:
        record.refuse("has neither output_ids nor output_token_logprobs", _SGLANG)
    if named is not None and len(named) == len(ids) and not np.array_equal(named, ids):
        record.refuse("has output_ids that differ from those of output_token_logprobs", "Keep the answer as it came.")
    before = _pairs(meta, "input_token_logprobs")
    whole = before is not None and len(before) == meta.fields.get("prompt_tokens", len(before))
    given = {"prompt_token_ids": [pair[1] for pair in before]} if whole and before else {}
    places = [Record(given, record.place, record.row, record.written_for), meta, record, answer, request]
    single = meta.fields.get("weight_version")
    versions = _versions(meta, meta.fields.get("weight_versions"), len(ids))
    reason = meta.fields.get("finish_reason")
    return {
        PROMPT: _prompt(record, _SGLANG, *places),
        RESPONSE: ids,
        "rollout_logprobs": None if pairs is None else list_of(meta, "rollout_logprobs", [pair[0] for pair in pairs]),
        "weight_version": _version(single) if versions is None and single is not None else versions,
        "finish_reason": reason.get("type") if isinstance(reason, Mapping) else reason,
    }


def _pairs(meta: Record, key: str) -> list[Any] | None:
    """Lists of log-prob, id and text; None where they were not asked for."""
    value = meta.fields.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) >= 2 for one in value):
        meta.refuse(f"has {key} that are not lists of log-prob, id and text", _SGLANG)
    return value
