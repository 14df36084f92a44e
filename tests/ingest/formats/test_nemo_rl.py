"""NeMo-RL's train data; the records are built as its logger builds them: a batch of one per line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import IngestError
from tests.ingest.formats.dumps import assert_row, read, write_lines


def sample(**changes: Any) -> dict[str, Any]:
    """Two prompt tokens, three of the response with one of a tool, two of padding."""
    plain = {
        "content": "text",
        "rewards": 1.0,
        "input_lengths": 5,
        "token_ids": [11, 12, 13, 14, 15, 0, 0],
        "token_loss_mask": [0, 0, 1, 0, 1, 0, 0],
        "sample_loss_mask": 1.0,
        "advantages": [0.0, 0.0, 0.5, 0.5, 0.5, 0.0, 0.0],
        "generation_logprobs": [0.0, 0.0, -0.25, 0.0, -1.5, 0.0, 0.0],
        "prev_logprobs": [0.0, -3.0, -0.5, -7.0, -1.25, -2.0, -2.0],
    }
    return plain | changes


def nested(record: dict[str, Any]) -> dict[str, Any]:
    return {key: [value] for key, value in record.items()} | {"idx": 0}


EXPECTED = {
    "prompt_token_ids": [11, 12],
    "response_token_ids": [13, 14, 15],
    "loss_mask": [True, False, True],
    "rollout_logprobs": [-0.25, 0.0, -1.5],
    "trainer_logprobs": [-0.5, -7.0, -1.25],
    "advantages": [0.5, 0.5, 0.5],
    "reward": 1.0,
    "step": 7,
}


@pytest.mark.parametrize("as_written", [nested, lambda record: record], ids=["nested", "flat"])
def test_comes_back_exactly(tmp_path: Path, as_written: Any) -> None:
    recorded, (row,) = read(write_lines(tmp_path / "train_data_step7.jsonl", [as_written(sample())]), tmp_path)
    assert_row(row, EXPECTED)
    assert recorded.file.format == "nemo-rl"
    assert recorded.rollout
    assert recorded.trainer


def test_steps_of_a_folder_in_natural_order_beside_validation(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for step in (10, 2, 1):
        write_lines(logs / f"train_data_step{step}.jsonl", [nested(sample(rewards=float(step)))])
    write_lines(logs / "val_data_step2.jsonl", [{"content": ["x"], "rewards": [1.0]}])
    recorded, rows = read(logs, tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 10]
    assert [row["reward"] for row in rows] == [1.0, 2.0, 10.0]
    assert recorded.file.n_files == 3


def test_filtered_rewards_are_those_of_the_lines(tmp_path: Path) -> None:
    record = nested(sample(rewards=0.25, filtered_rewards=0.75))
    _, (row,) = read(write_lines(tmp_path / "train_data_step1.jsonl", [record]), tmp_path)
    assert row["reward"] == 0.75


def test_masked_samples_and_agents(tmp_path: Path) -> None:
    records = [nested(sample(agent_ref={"name": "swe"})), nested(sample(sample_loss_mask=0.0, agent_ref={"name": "x"}))]
    recorded, rows = read(write_lines(tmp_path / "train_data_step1.jsonl", records), tmp_path)
    assert recorded.file.n_masked_sequences == 1
    assert rows[1]["response_token_ids"] == [13, 14, 15]
    assert rows[1]["loss_mask"] == [False] * 3
    assert [row["tags"] for row in rows] == ["swe", "x"]


def test_one_token_and_nothing_sampled(tmp_path: Path) -> None:
    one = sample(
        token_ids=[9],
        token_loss_mask=[1],
        input_lengths=1,
        advantages=[0.5],
        generation_logprobs=[0.0],
        prev_logprobs=[0.0],
    )
    nothing = sample(token_loss_mask=[0] * 7)
    recorded, (row,) = read(write_lines(tmp_path / "a.jsonl", [nested(one), nested(nothing)]), tmp_path)
    assert row["response_token_ids"] == [9]
    assert recorded.file.n_empty_responses == 1
    assert "step" not in recorded.file.keys


def test_values_that_are_none_stay(tmp_path: Path) -> None:
    line = json.dumps(nested(sample(generation_logprobs=[0.0, 0.0, math.nan, 0.0, None, 0.0, 0.0])))
    path = tmp_path / "train_data_step1.jsonl"
    path.write_text(line.replace("-1.25", "-Infinity"))
    _, (row,) = read(path, tmp_path)
    assert_row(row, {"rollout_logprobs": [math.nan, 0.0, math.nan], "trainer_logprobs": [-0.5, -7.0, -math.inf]})


def test_wrong_lengths_are_left_out(tmp_path: Path) -> None:
    short = sample(generation_logprobs=[-0.25, 0.0, -1.5, 0.0])
    recorded, rows = read(write_lines(tmp_path / "a.jsonl", [nested(sample()), nested(short)]), tmp_path)
    assert len(rows) == 1
    assert recorded.file.n_left_out == 1


@pytest.mark.parametrize("key", ["prev_logprobs", "generation_logprobs", "input_lengths", "advantages"])
def test_a_missing_key_is_named_with_project_and_version(tmp_path: Path, key: str) -> None:
    record = nested(sample())
    del record[key]
    with pytest.raises(IngestError) as error:
        read(write_lines(tmp_path / "a.jsonl", [nested(sample()), record]), tmp_path)
    assert "Line 2" in error.value.what
    assert key in error.value.what
    assert "NeMo-RL 0.6" in error.value.fix


@pytest.mark.parametrize("length", [8, -1, 2.5, "5", None])
def test_impossible_lengths(tmp_path: Path, length: Any) -> None:
    with pytest.raises(IngestError, match="input_lengths"):
        read(write_lines(tmp_path / "a.jsonl", [nested(sample(input_lengths=length))]), tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [nested(sample()), nested(sample())])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(IngestError, match="Line 2"):
        read(path, tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="no rows"):
        read(write_lines(tmp_path / "train_data_step1.jsonl", []), tmp_path)
