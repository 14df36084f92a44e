"""Answers of vLLM, OpenAI's interfaces and SGLang, as their protocols write them; token-difr; dumps of text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.base import Place, Record
from mismatch_probe.ingest.formats import formats
from tests.ingest.formats.dumps import assert_row, read, write_lines

PLAIN = {
    "prompt_token_ids": [1, 2],
    "response_token_ids": [3, 4],
    "rollout_logprobs": [-0.5, -1.25],
    "finish_reason": "stop",
}
CONTENT = [{"token": "token_id:3", "logprob": -0.5, "top_logprobs": []}, {"token": "token_id:4", "logprob": -1.25}]


def completion(**changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": "ab",
        "logprobs": {"token_logprobs": [-0.5, -1.25], "tokens": ["token_id:3", "token_id:4"], "top_logprobs": []},
        "finish_reason": "stop",
        "token_ids": None,
        "prompt_token_ids": [1, 2],
    } | changes
    return {"id": "c", "object": "text_completion", "model": "m", "choices": [choice], "usage": {}}


def chat(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {}, "logprobs": {"content": CONTENT}, "finish_reason": "stop", "token_ids": [3, 4]}
    return {"object": "chat.completion", "model": "m", "choices": [choice | changes], "prompt_token_ids": [1, 2]}


def request_output(**changes: Any) -> dict[str, Any]:
    logprobs = [{"3": {"logprob": -0.5, "rank": 2}, "8": {"logprob": -0.25, "rank": 1}}, {"4": {"logprob": -1.25}}]
    output = {"index": 0, "token_ids": [3, 4], "logprobs": logprobs, "finish_reason": "stop"}
    return {"request_id": "r", "prompt_token_ids": [1, 2], "outputs": [output | changes]}


def generated(**changes: Any) -> dict[str, Any]:
    content = [{"token_id": 3, "logprob": -0.5}, {"token_id": 4, "logprob": -1.25}]
    choice = {"index": 0, "token_ids": [3, 4], "logprobs": {"content": content}, "finish_reason": "stop"}
    return {"request_id": "r", "choices": [choice | changes], "prompt_logprobs": None}


def sglang(**meta: Any) -> dict[str, Any]:
    return {
        "text": "ab",
        "output_ids": [3, 4],
        "meta_info": {
            "id": "x",
            "finish_reason": {"type": "stop", "matched": 4},
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "input_token_logprobs": [[None, 1, None], [-3.0, 2, None]],
            "output_token_logprobs": [[-0.5, 3, None], [-1.25, 4, "b"]],
        }
        | meta,
    }


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (completion(), "vllm"),
        (completion(token_ids=[3, 4]), "vllm"),
        (chat(), "vllm"),
        (chat(token_ids=None), "vllm"),
        (request_output(), "vllm"),
        (generated() | {"prompt_token_ids": [1, 2]}, "vllm"),
        ({"request": {"token_ids": [1, 2]}, "response": generated()}, "vllm"),
        ({"request": {"prompt": [1, 2]}, "response": completion(prompt_token_ids=None)}, "vllm"),
        (sglang(), "sglang"),
        ({"request": {"input_ids": [1, 2]}, "response": sglang(input_token_logprobs=[])}, "vllm"),
        ({**sglang(input_token_logprobs=None), "input_ids": [1, 2]}, "sglang"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_comes_back_exactly(tmp_path: Path, record: Any, name: str, suffix: str) -> None:
    path = write_lines(tmp_path / f"a.{suffix}", [record] if suffix == "jsonl" else [[record]])
    recorded, (row,) = read(path, tmp_path)
    assert_row(row, PLAIN)
    assert recorded.file.format == name
    assert "weight_version" not in recorded.file.keys


def test_several_choices(tmp_path: Path) -> None:
    answer = chat()
    answer["choices"] *= 3
    _, rows = read(write_lines(tmp_path / "a.jsonl", [answer]), tmp_path)
    assert len(rows) == 3
    assert [row["sample_id"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize(
    "spans",
    [
        [{"version": "3", "start": 0, "end": 1}, {"version": "step-12", "start": 1, "end": 2}],
        [["3", 0, 1], ["step-12", 1, 2]],
    ],
)
@pytest.mark.parametrize("make", [sglang, lambda **meta: generated(**meta) | {"prompt_token_ids": [1, 2]}])
def test_weights_within_a_response(tmp_path: Path, spans: Any, make: Any) -> None:
    _, (row,) = read(write_lines(tmp_path / "a.jsonl", [make(weight_versions=spans)]), tmp_path)
    assert row["weight_version"] == [3, 12]


@pytest.mark.parametrize(("label", "number"), [("7", 7), ("default", -1), (5, 5)])
def test_weights_of_a_whole_response(tmp_path: Path, label: Any, number: int) -> None:
    _, (row,) = read(write_lines(tmp_path / "a.jsonl", [sglang(weight_version=label)]), tmp_path)
    assert row["weight_version"] == [number, number]


def test_placeholders_stay(tmp_path: Path) -> None:
    record = chat(logprobs={"content": [{"token": "x", "logprob": -9999.0}, {"token": "y", "logprob": None}]})
    _, (row,) = read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
    assert_row(row, {"rollout_logprobs": [-9999.0, math.nan]})


def test_an_id_without_its_log_prob_is_null(tmp_path: Path) -> None:
    record = request_output(logprobs=[{"8": {"logprob": -0.25}}, {"4": {"logprob": -1.25}}])
    _, (row,) = read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
    assert_row(row, {"rollout_logprobs": [math.nan, -1.25]})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (completion(prompt_token_ids=None), "return_token_ids"),
        (chat(token_ids=None, logprobs={"content": [{"token": "a", "logprob": -1.0}]}), "return_token_ids"),
        (generated(), "request"),
        (sglang(input_token_logprobs=None), "logprob_start_len"),
        (sglang(prompt_tokens=9), "logprob_start_len"),
    ],
)
def test_without_ids_it_says_what_to_ask_for(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(IngestError) as error:
        read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
    assert said in error.value.fix


def test_ids_that_differ_from_those_of_the_log_probs(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="differ"):
        read(write_lines(tmp_path / "a.jsonl", [sglang() | {"output_ids": [3, 5]}]), tmp_path)


def test_wrong_lengths_are_left_out(tmp_path: Path) -> None:
    records = [chat(), chat(token_ids=[3, 4, 5]), request_output(logprobs=[{}, {}, {}])]
    recorded, rows = read(write_lines(tmp_path / "a.jsonl", records), tmp_path)
    assert (len(rows), recorded.file.n_left_out) == (1, 2)


def test_token_difr_has_ids_alone() -> None:
    fields = {
        "config": {"model": "m"},
        "samples": [{"prompt_token_ids": [1], "outputs": [{"token_ids": [2, 3]}, {"token_ids": [4]}]}] * 2,
    }
    record = Record(fields, Place("a.json", "Sample"), 1)
    rows = list(formats()["token-difr"].rows(record))
    assert [row["response_token_ids"] for row in rows] == [[2, 3], [4]] * 2
    assert formats()["token-difr"].fit(fields) == 2


TEXT: dict[str, dict[str, Any]] = {
    "verl-text": {"input": "a", "output": "b", "gts": "c", "score": 1.0, "step": 1},
    "areal-text": {"task_id": 1, "sample_idx": 0, "seqlen": 4, "head_version": 1, "prompt": "a", "completion": "b"},
    "nemo-rl-text": {"content": ["a"], "input_lengths": [3], "idx": 0},
    "trl-text": {"step": 1, "prompt": "a", "completion": "b", "reward": 1.0, "advantage": 0.5},
}


@pytest.mark.parametrize("name", sorted(TEXT))
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_text_is_refused_with_what_to_switch_on(tmp_path: Path, name: str, asked: str) -> None:
    if name == "trl-text":
        path = tmp_path / "completions_00001.parquet"
        pq.write_table(pa.Table.from_pylist([TEXT[name]]), path)
    else:
        path = write_lines(tmp_path / "1.jsonl", [TEXT[name]])
    with pytest.raises(IngestError) as error:
        read(path, tmp_path, format=name if asked == "named" else "auto")
    assert formats()[name].project in error.value.what
    assert error.value.fix == formats()[name].switch


def test_a_document_with_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([chat(), 3]))
    with pytest.raises(IngestError, match="Sample 2"):
        read(path, tmp_path)
