"""Formats with turns (torchtitan, verifiers, NeMo-Gym) and open-instruct; records are built as their writers do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import IngestError
from tests.ingest.formats.dumps import assert_row, read, write_lines

NAN = math.nan
# Two turns that continue each other, then one whose history was rewritten.
PROMPTS = ([1, 2], [1, 2, 3, 4, 9, 9], [1, 2, 9])
RESPONSES = ([3, 4], [5], [6, 7])
LOGPROBS = ([-0.5, -1.0], [-2.0], [-0.25, -0.125])
FIRST = {
    "prompt_token_ids": [1, 2],
    "response_token_ids": [3, 4, 9, 9, 5],
    "loss_mask": [True, True, False, False, True],
    "rollout_logprobs": [-0.5, -1.0, NAN, NAN, -2.0],
    "turn": [0, 0, 1, 1, 1],
}
SECOND = {
    "prompt_token_ids": [1, 2, 9],
    "response_token_ids": [6, 7],
    "loss_mask": [True, True],
    "rollout_logprobs": [-0.25, -0.125],
    "turn": [2, 2],
}


def turns(*keys: str) -> list[dict[str, Any]]:
    return [dict(zip(keys, values, strict=True)) for values in zip(PROMPTS, RESPONSES, LOGPROBS, strict=True)]


class TestTorchtitan:
    def rollout(self, **changes: Any) -> dict[str, Any]:
        parts = turns("prompt_token_ids", "completion_token_ids", "completion_logprobs")
        for number, part in enumerate(parts):
            part |= {"turn_id": number, "min_policy_version": number + 4, "max_policy_version": number + 5}
        return {
            "is_validation": False,
            "group_id": 0,
            "rollout_id": 1,
            "status": "completed",
            "reward": 0.5,
            "reward_breakdown": {},
            "advantage": -0.5,
            "turns": parts,
        } | changes

    def test_comes_back_exactly(self, tmp_path: Path) -> None:
        recorded, rows = read(write_lines(tmp_path / "rollout_samples.jsonl", [self.rollout()]), tmp_path)
        assert_row(rows[0], FIRST | {"weight_version": [4, 4, -1, -1, 5], "tags": "training", "reward": 0.5})
        assert_row(rows[1], SECOND | {"weight_version": [6, 6], "finish_reason": "completed"})
        assert recorded.file.format == "torchtitan"

    def test_unscored_rollouts(self, tmp_path: Path) -> None:
        records = [self.rollout(), self.rollout(advantage=None, reward=None)]
        _, rows = read(write_lines(tmp_path / "a.jsonl", records), tmp_path)
        assert_row(rows[2], {"advantages": [NAN] * 5, "reward": None})

    def test_one_turn_alone(self, tmp_path: Path) -> None:
        (record, *_) = turns("prompt_token_ids", "completion_token_ids", "completion_logprobs")
        recorded, (row,) = read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
        assert_row(row, {"response_token_ids": [3, 4], "rollout_logprobs": [-0.5, -1.0]})
        assert recorded.file.format == "torchtitan"

    def test_without_tensors_it_says_what_to_switch_on(self, tmp_path: Path) -> None:
        record = self.rollout(turns=[{"turn_id": 0, "prompt_messages": []}])
        with pytest.raises(IngestError) as error:
            read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
        assert "log_tensors" in error.value.fix

    def test_wrong_lengths_are_left_out(self, tmp_path: Path) -> None:
        bad = self.rollout()
        bad["turns"][1]["completion_logprobs"] = [-2.0, -3.0]
        recorded, rows = read(write_lines(tmp_path / "a.jsonl", [self.rollout(), bad]), tmp_path)
        assert (len(rows), recorded.file.n_left_out) == (3, 1)


class TestVerifiers:
    def test_flat(self, tmp_path: Path) -> None:
        record = {
            "prompt_ids": [1, 2],
            "prompt_mask": [0, 0],
            "completion_ids": [3, 4],
            "completion_mask": [1, 0],
            "completion_logprobs": [-0.5, None],
            "reward": 1,
        }
        recorded, (row,) = read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
        assert_row(row, {"loss_mask": [True, False], "rollout_logprobs": [-0.5, NAN], "reward": 1.0})
        assert recorded.file.format == "verifiers"

    def test_trajectory(self, tmp_path: Path) -> None:
        steps = [{"tokens": tokens} for tokens in turns("prompt_ids", "completion_ids", "completion_logprobs")]
        record = {"trajectory": [*steps, {"tokens": None}], "reward": 0.5, "advantage": 2.0}
        _, rows = read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
        assert_row(rows[0], FIRST | {"advantages": [2.0] * 5})
        assert_row(rows[1], SECOND)

    def graph(self, **changes: Any) -> dict[str, Any]:
        """A prompt, an answer of two tokens, then two branches, one of which has nothing of its own."""
        nodes = [
            {"token_ids": [1], "mask": [False], "logprobs": [], "sampled": False},
            {"parent": 0, "token_ids": [2, 3, 4], "mask": [False, True, True], "logprobs": [-0.5, -1.0]},
            {"parent": 1, "token_ids": [9], "mask": [False], "logprobs": []},
            {"parent": 2, "token_ids": [8, 5], "mask": [False, True], "logprobs": [-2.0], "advantages": [0.5]},
            {"parent": 1, "token_ids": [7, 6], "mask": [False, True], "logprobs": [-3.0], "advantages": [1.5]},
        ]
        return {"task": {"type": "t"}, "nodes": nodes, "rewards": {"a": {"score": 0.5, "weight": 2.0}}} | changes

    def test_graph(self, tmp_path: Path) -> None:
        work = {"type": "train", "step": 4, "policy": {"start": 3, "end": 3}}
        episode = {"id": "e", "env": {"id": "math"}, "task": {}, "traces": [self.graph()], "run": {"work": work}}
        recorded, rows = read(write_lines(tmp_path / "traces.jsonl", [episode]), tmp_path)
        shared = {"prompt_token_ids": [1, 2], "step": 4, "weight_version": [3] * 5, "tags": "math", "reward": 1.0}
        expected = {
            "response_token_ids": [3, 4, 9, 8, 5],
            "loss_mask": [True, True, False, False, True],
            "rollout_logprobs": [-0.5, -1.0, NAN, NAN, -2.0],
            "advantages": [NAN, NAN, NAN, NAN, 0.5],
            "turn": [1, 1, 2, 3, 3],
        }
        assert_row(rows[0], shared | expected)
        # What the first branch has counted counts once.
        assert_row(
            rows[1],
            {
                "response_token_ids": [3, 4, 7, 6],
                "loss_mask": [False, False, False, True],
                "rollout_logprobs": [-0.5, -1.0, NAN, -3.0],
            },
        )
        assert recorded.file.n_sequences == 2

    @pytest.mark.parametrize(
        "node",
        [
            {"token_ids": [1, 2], "mask": [True], "logprobs": [-1.0]},
            {"token_ids": [1, 2], "mask": [True, True], "logprobs": [-1.0]},
            {"parent": 0, "token_ids": [1], "mask": [True], "logprobs": [-1.0]},
            {"parent": "x", "token_ids": [1], "mask": [True], "logprobs": [-1.0]},
        ],
    )
    def test_a_broken_graph(self, tmp_path: Path, node: dict[str, Any]) -> None:
        with pytest.raises(IngestError, match="nodes"):
            read(write_lines(tmp_path / "a.jsonl", [self.graph(nodes=[node])]), tmp_path)

    def test_without_tokens(self, tmp_path: Path) -> None:
        with pytest.raises(IngestError, match="tokens"):
            read(write_lines(tmp_path / "a.jsonl", [{"trajectory": [{"tokens": None}]}]), tmp_path)


class TestNemoGym:
    def test_a_rollout(self, tmp_path: Path) -> None:
        calls = turns("prompt_token_ids", "generation_token_ids", "generation_log_probs")
        nothing = {"prompt_token_ids": [], "generation_token_ids": [], "generation_log_probs": []}
        output = [nothing, calls[0], {"type": "function_call_output"}, *calls[1:]]
        record = {"responses_create_params": {}, "response": {"output": output}, "reward": 1.0, "_ng_task_index": 0}
        recorded, rows = read(write_lines(tmp_path / "rollouts.jsonl", [record]), tmp_path)
        assert_row(rows[0], FIRST | {"reward": 1.0})
        assert_row(rows[1], SECOND)
        assert recorded.file.written_for == "NeMo-Gym 0.5"

    def test_captured_calls(self, tmp_path: Path) -> None:
        calls = turns("prompt_token_ids", "generation_token_ids", "generation_log_probs")
        records = [{"schema_version": 1, "rollout_id": "r", **call} for call in calls]
        _, rows = read(write_lines(tmp_path / "r.tokens.jsonl", records), tmp_path)
        assert [row["response_token_ids"] for row in rows] == list(RESPONSES)
        assert [row["prompt_token_ids"] for row in rows] == list(PROMPTS)

    def test_without_ids(self, tmp_path: Path) -> None:
        record = {"responses_create_params": {}, "response": {"output": [{"type": "message"}]}}
        with pytest.raises(IngestError) as error:
            read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
        assert "return_token_id_information" in error.value.fix


class TestOpenInstruct:
    def sample(self, **changes: Any) -> dict[str, Any]:
        return {
            "step": 2,
            "sample_idx": 0,
            "prompt_idx": 0,
            "prompt_tokens": [1, 2],
            "response_tokens": [3, 4, 0],
            "reward": 10.0,
            "advantage": 1.5,
            "finish_reason": "stop",
            "dataset": ["gsm8k", "math"],
            "ground_truth": None,
            "request_info": None,
            "logprobs": [-0.5, -1.0, NAN],
        } | changes

    def test_shards_in_order_beside_metadata(self, tmp_path: Path) -> None:
        for shard in (10, 2):
            path = tmp_path / "out" / f"run_rollouts_{shard:06d}.jsonl"
            write_lines(path, [self.sample(step=shard)])
        write_lines(tmp_path / "out" / "run_metadata.jsonl", [{"run_name": "run", "git_commit": "x"}])
        recorded, rows = read(tmp_path / "out", tmp_path)
        assert [row["step"] for row in rows] == [2, 10]
        assert_row(
            rows[0],
            {
                "prompt_token_ids": [1, 2],
                "response_token_ids": [3, 4, 0],
                "rollout_logprobs": [-0.5, -1.0, NAN],
                "advantages": [1.5] * 3,
                "reward": 10.0,
                "finish_reason": "stop",
                "tags": "gsm8k, math",
            },
        )
        assert recorded.file.n_files == 2

    def test_a_missing_key(self, tmp_path: Path) -> None:
        record = self.sample()
        del record["step"]
        with pytest.raises(IngestError) as error:
            read(write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
        assert "step" in error.value.what
        assert "open-instruct" in error.value.fix
