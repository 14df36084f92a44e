"""slime and miles: built as their writers do, `torch.save` of the documented dicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.read import ReadOptions
from tests.ingest.formats.tensors import columns, rows

LISTS = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask")


def sample(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "group_index": index // 2,
        "prompt": "not read",
        "tokens": [5, 6, 70000, 8, 9 + index],
        "response_length": 2,
        "reward": 0.5,
        "loss_mask": [1, 1 - index % 2],
        "weight_versions": ["3"],
        "rollout_log_probs": [-0.1 - index, -0.25],
        "status": "completed",
        "metadata": {},
    } | changes


def save(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def rollout(root: Path, step: int, *samples: dict[str, Any]) -> Path:
    return save(root / f"rollout_data/{step}.pt", {"rollout_id": step, "samples": list(samples)})


def newer(root: Path, step: int, **scores: list[float]) -> Path:
    values = [{"sample_index": int(key[1:]), "log_probs": torch.tensor(value)} for key, value in scores.items()]
    return save(root / f"train_data/{step}.pt", {"format_version": 2, "samples": values})


def older(root: Path, step: int, rank: int, indices: list[int], **changes: Any) -> Path:
    data = {
        "tokens": [torch.tensor([5, 6, 70000, 8, 9 + index]) for index in indices],
        "response_lengths": [2] * len(indices),
        "loss_masks": [torch.tensor([1, 1 - index % 2]) for index in indices],
        "log_probs": [torch.tensor([-0.5 - index, -0.75]) for index in indices],
        "rollout_log_probs": [torch.tensor([-0.5 - index, -0.25]) for index in indices],
        "rewards": [0.5] * len(indices),
        "sample_indices": indices,
    } | changes
    data = {key: value for key, value in data.items() if value is not None}
    return save(root / f"train_data/{step}_{rank}.pt", {"rollout_id": step, "rank": rank, "rollout_data": data})


def test_folder_of_both_is_joined_on_the_index(tmp_path: Path) -> None:
    for step in (10, 2):
        rollout(tmp_path, step, sample(0), sample(1))
        newer(tmp_path, step, i1=[-2.0, -3.0], i0=[-4.0 - step, -5.0])
    found = columns(tmp_path, *LISTS, "step", "prompt_id", "reward", "weight_version", "finish_reason")
    assert found == [
        (
            [5, 6, 70000],
            [8, 9 + index],
            [-0.1 - index, -0.25],
            [-2.0, -3.0] if index else [-4.0 - step, -5.0],
            [True, index == 0],
            step,
            "0",
            0.5,
            [3, 3],
            "completed",
        )
        for step in (2, 10)
        for index in (0, 1)
    ]


def test_ranks_of_older_files_are_joined_too(tmp_path: Path) -> None:
    rollout(tmp_path, 0, sample(0), sample(1), sample(2))
    older(tmp_path, 0, 1, [0], log_probs=[torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)])
    older(tmp_path, 0, 0, [2])
    older(tmp_path, 0, 2, [1], log_probs=None)
    trainer = [row["trainer_logprobs"] for row in rows(tmp_path)]
    assert (trainer[0], trainer[2]) == ([-1.0, -2.0], [-2.5, -0.75])
    assert all(map(math.isnan, trainer[1])), "one that the trainer did not score is not left out in silence"


def test_older_files_hold_both_sides_themselves(tmp_path: Path) -> None:
    older(tmp_path, 7, 0, [0, 1])
    assert columns(tmp_path, *LISTS, "step") == [
        ([5, 6, 70000], [8, 9 + i], [-0.5 - i, -0.25], [-0.5 - i, -0.75], [True, i == 0], 7) for i in (0, 1)
    ]


def test_rollout_alone(tmp_path: Path) -> None:
    path = rollout(tmp_path, 1, sample(0, loss_mask=None), sample(1, weight_versions=["2", "3"]))
    assert columns(path, "trainer_logprobs", "loss_mask", "weight_version") == [
        (None, [True, True], [3, 3]),
        (None, [True, False], [-1, -1]),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": None}, "has no tokens; its keys are"),
        ({"response_length": 6}, "response_length that does not fit its 5 tokens"),
        ({"tokens": "text"}, "has tokens that is text"),
        ({"rollout_log_probs": [-1.0]}, "has 1 rollout_logprobs for 2 response_token_ids"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = rollout(tmp_path, 1, sample(0, **change))
    with pytest.raises(IngestError, match=said):
        rows(path)


def test_newer_scores_alone_have_no_ids(tmp_path: Path) -> None:
    newer(tmp_path, 1, i0=[-1.0, -2.0])
    with pytest.raises(IngestError, match="rollout_data and train_data"):
        rows(tmp_path)


def test_nothing_is_read_without_trust(tmp_path: Path) -> None:
    path = rollout(tmp_path, 1, sample(0))
    with pytest.raises(IngestError, match="--trust-pickle"):
        rows(path, ReadOptions())
