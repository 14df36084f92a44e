"""TRL: the batch as `GRPOTrainer` keeps it, and samples that its own `RolloutSample` wrote."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mismatch_probe.errors import IngestError
from tests.ingest.formats.tensors import columns, rows

WRITTEN = Path(__file__).parent / "written"
KEYS = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask", "advantages")


def batch(**changes: Any) -> dict[str, Any]:
    good = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, 0.0, -2.0], [-0.5, 0.0, 0.0]]),
        "old_per_token_logps": torch.tensor([[-1.5, -9.0, -2.5], [-0.75, -3.0, -3.0]]),
        "advantages": torch.tensor([0.5, -0.5]),
        "num_items_in_batch": torch.tensor(4),
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


EXPECTED = [
    ([5, 6], [1, 2, 3], [-1.0, 0.0, -2.0], [-1.5, -9.0, -2.5], [True, False, True], [0.5] * 3),
    ([7, 8, 9], [4], [-0.5], [-0.75], [True], [-0.5]),
]


def test_both_ways_to_save(tmp_path: Path) -> None:
    torch.save(batch(), tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(batch()))
    for name in ("a.pt", "b.pkl"):
        assert columns(tmp_path / name, *KEYS) == EXPECTED


def test_one_side_and_no_tools(tmp_path: Path) -> None:
    torch.save(batch(old_per_token_logps=None, tool_mask=None), tmp_path / "a.pt")
    assert columns(tmp_path / "a.pt", *KEYS[2:5]) == [([-1.0, 0.0, -2.0], None, [True] * 3), ([-0.5], None, [True])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampling_per_token_logps": torch.zeros(2, 2)}, "has 2 rollout_logprobs for 3 ids"),
        ({"completion_mask": torch.ones(2, 4)}, "has a response mask of 4 for 3 ids"),
        ({"old_per_token_logps": torch.zeros(3, 3)}, "has old_per_token_logps of 3 sequences and completion_ids of 2"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    torch.save(batch(**change), tmp_path / "x.pt")
    with pytest.raises(IngestError, match=said):
        rows(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["trl_async.pt", "trl_async.pkl"])
def test_old_log_probs_of_the_asynchronous_trainer_are_the_engines(name: str) -> None:
    keys = (
        "prompt_token_ids",
        "response_token_ids",
        "rollout_logprobs",
        "trainer_logprobs",
        "weight_version",
        "reward",
    )
    assert columns(WRITTEN / name, *keys) == [([5, 6], [1, 2], [-1.5, -2.0], None, [7, 7], 1.0)] * 2
