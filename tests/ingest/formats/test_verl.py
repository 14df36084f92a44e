"""verl: files that its own `DataProto` wrote, and the same dict by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.read import read_dump
from tests.ingest.formats.tensors import TRUSTED, columns, rows

WRITTEN = Path(__file__).parent / "written"
KEYS = (
    "prompt_token_ids",
    "response_token_ids",
    "rollout_logprobs",
    "trainer_logprobs",
    "loss_mask",
    "prompt_id",
    "step",
)


def test_steps_in_natural_order_by_both_ways_to_write() -> None:
    assert columns(WRITTEN / "verl", *KEYS) == [
        row
        for step in (3, 12)
        for row in (
            ([5, 6], [1, 2], [-0.5, -1.0], [-0.25, -1.5], [True, False], "a", step),
            ([7, 8, 9], [3], [-2.0], [-2.5], [True], "b", step),
        )
    ]


def test_nested_tensors_of_the_transfer_queue() -> None:
    assert columns(WRITTEN / "verl_tq", *KEYS[:5], "step") == [
        ([5, 6], [1, 2], [-0.5, -1.0], None, [True, False], 4),
        ([7, 8, 9], [3], [-2.0], None, [True], 4),
    ]


def test_prompts_beside_are_not_read(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "verl", tmp_path / "dump")
    shutil.copy(WRITTEN / "tinker.pkl", tmp_path / "dump/3/new_batch.dp")
    assert len(rows(tmp_path / "dump")) == 4


def test_what_is_loaded_whole_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    read_dump(WRITTEN / "verl", tmp_path / "out", TRUSTED, said.append)
    assert [line.partition(" ")[0].rpartition("verl/")[2] for line in said] == ["3/gen_batch.dp", "12/gen_batch.dp"]


def batch(**changes: Any) -> dict[str, Any]:
    good = {
        "prompts": torch.tensor([[0, 5]]),
        "responses": torch.tensor([[1, 2, 0]]),
        "response_mask": torch.tensor([[1, 1, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 0]]),
        "rollout_log_probs": torch.tensor([[-1.0, float("nan"), 0.0]]),
        "token_level_scores": torch.tensor([[0.0, 1.5, 0.0]]),
        "data_source": np.array(["gsm8k"], object),
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def test_dict_by_hand(tmp_path: Path) -> None:
    torch.save(batch(), tmp_path / "x.pt")
    (row,) = rows(tmp_path / "x.pt")
    assert (row["prompt_token_ids"], row["response_token_ids"], row["tags"], row["reward"]) == (
        [5],
        [1, 2],
        "gsm8k",
        1.5,
    )
    np.testing.assert_array_equal(row["rollout_logprobs"], [-1.0, np.nan])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": torch.tensor([[0, 5], [1, 2]])}, "has prompts of 2 sequences and responses of 1"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "has 2 attention_mask for 2 prompts and 3 responses"),
        ({"rollout_log_probs": torch.tensor([[-1.0]])}, "has 1 rollout_logprobs for 3 ids"),
        ({"responses": torch.zeros(1, 2, 3)}, "has responses that is "),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    torch.save(batch(**change), tmp_path / "x.pt")
    with pytest.raises(IngestError, match=said):
        rows(tmp_path / "x.pt")


def test_truncated_file(tmp_path: Path) -> None:
    data = (WRITTEN / "verl/3/gen_batch.dp").read_bytes()
    (tmp_path / "x.dp").write_bytes(data[: len(data) // 2])
    with pytest.raises(IngestError, match="cannot be read"):
        rows(tmp_path / "x.dp")


def test_ids_alone_are_read_to_be_scored(tmp_path: Path) -> None:
    torch.save(batch(rollout_log_probs=None), tmp_path / "x.pt")
    (row,) = rows(tmp_path / "x.pt")
    assert row["response_token_ids"] == [1, 2]
    assert "rollout_logprobs" not in row
