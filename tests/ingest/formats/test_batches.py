"""ROLL, PipelineRL, AReaL and Tinker: batches built from the documented fields, with their shifts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mismatch_probe.errors import IngestError
from tests.ingest.formats.tensors import columns, rows

WRITTEN = Path(__file__).parent / "written"
LISTS = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask")


def save(folder: Path, fields: Any) -> Path:
    torch.save(fields, folder / "x.pt")
    return folder / "x.pt"


def test_roll_has_one_value_less_than_ids(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        {
            "input_ids": torch.tensor([[0, 5, 6, 1, 2, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0]]),
            "prompt_mask": torch.tensor([[0, 1, 1, 0, 0, 0]]),
            "response_mask": torch.tensor([[0, 0, 0, 1, 1, 0]]),
            "infer_logprobs": torch.tensor([[0.0, 0.0, -1.0, -2.0, 0.0]]),
            "old_log_probs": torch.tensor([[-7.0, -8.0, -1.5, -2.5, -9.0]]),
            "prompts": torch.tensor([[0, 5, 6]]),
            "responses": torch.tensor([[1, 2, 0]]),
            "meta_info": {"global_step": 4},
        },
    )
    assert columns(path, *LISTS, "step") == [([5, 6], [1, 2], [-1.0, -2.0], [-1.5, -2.5], [True, True], 4)]


def packed(**changes: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([[5, 6, 1, 2, 7, 3, 4, 0]]),
        "labels": torch.tensor([[-100, -100, 1, 2, -100, 3, 4, -100]]),
        "attention_mask": torch.ones(1, 8).long(),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
        "old_logprobs": torch.tensor([[0, 0, -1.0, -2.0, 0, -3.0, -4.0, 0]]),
        "ref_logprobs": torch.tensor([[0, 0, -1.5, -2.5, 0, -3.5, -4.5, 0]]),
        "rewards": torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]]),
        "seq_boundaries": torch.tensor([0, 4, 7]),
        "model_version": 12,
    } | changes


def test_packed_sequences_of_pipelinerl(tmp_path: Path) -> None:
    keys = (
        "prompt_token_ids",
        "response_token_ids",
        "rollout_logprobs",
        "ref_logprobs",
        "weight_version",
        "pack_index",
    )
    path = save(tmp_path, packed())
    assert columns(path, *keys, "reward", "pack_id") == [
        ([5, 6], [1, 2], [-1.0, -2.0], [-1.5, -2.5], [12, 12], 0, 1.0, f"{path}:1"),
        ([7], [3, 4], [-3.0, -4.0], [-3.5, -4.5], [12, 12], 1, 0.0, f"{path}:1"),
    ]


def test_unpacked_sequences_of_pipelinerl(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    path = save(tmp_path, packed(seq_boundaries=None, attention_mask=mask))
    assert columns(path, *LISTS[:2], "loss_mask", "pack_index") == [
        ([5, 6], [1, 2, 7, 3, 4], [True, True, False, True, True], None)
    ]


@pytest.mark.parametrize("bounds", [[0, 9], [4, 0], [-1, 4], []])
def test_boundaries_that_do_not_fit(tmp_path: Path, bounds: list[int]) -> None:
    path = save(tmp_path, packed(seq_boundaries=torch.tensor(bounds, dtype=torch.int64)))
    with pytest.raises(IngestError, match="seq_boundaries that do not fit its 8 input_ids"):
        rows(path)


AREAL = {
    "input_ids": [[5, 6, 1, 2, 0], [7, 3, 8, 4, 9]],
    "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    "loss_mask": [[0, 0, 1, 1, 0], [0, 1, 0, 1, 1]],
    "logprobs": [[0.0, 0.0, -1.0, -2.0, 0.0], [0.0, -3.0, 0.0, -4.0, -5.0]],
    "versions": [[-1, -1, 3, 4, 0], [-1, 4, -1, 5, 5]],
    "prox_logp": [[-9.0, -1.5, -2.5, -8.0, -8.0], [-3.5, -7.0, -4.5, -5.5, -8.0]],
    "rewards": [1.0, 0.5],
}
AREAL_ROWS = [
    ([5, 6], [1, 2], [-1.0, -2.0], [-1.5, -2.5], [True, True], [3, 4], 1.0),
    (
        [7],
        [3, 8, 4, 9],
        [-3.0, 0.0, -4.0, -5.0],
        [-3.5, -7.0, -4.5, -5.5],
        [True, False, True, True],
        [4, -1, 5, 5],
        0.5,
    ),
]


def test_areal_as_tensors_and_as_json(tmp_path: Path) -> None:
    keys = (*LISTS, "weight_version", "reward")
    assert columns(save(tmp_path, {key: torch.tensor(value) for key, value in AREAL.items()}), *keys) == AREAL_ROWS
    (tmp_path / "x.json").write_text(json.dumps(AREAL))
    assert columns(tmp_path / "x.json", *keys) == AREAL_ROWS


def test_areal_one_trajectory_a_line(tmp_path: Path) -> None:
    lines = [{key: value[index] for key, value in AREAL.items() if key != "rewards"} for index in range(2)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert columns(tmp_path / "x.jsonl", *LISTS) == [row[:5] for row in AREAL_ROWS]


def test_areal_null_stays(tmp_path: Path) -> None:
    line = {"input_ids": [5, 1, 2], "loss_mask": [0, 1, 1], "logprobs": [0.0, None, -1.0], "versions": [-1, 0, 0]}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    np.testing.assert_array_equal(rows(tmp_path / "x.jsonl")[0]["rollout_logprobs"], [np.nan, -1.0])


TINKER = ([5, 6], [1, 2, 3], [-1.0, -2.0, -3.0], None, [True] * 3)


def test_tinkers_own_datum_is_shifted_by_one() -> None:
    assert columns(WRITTEN / "tinker.pkl", *LISTS, "advantages") == [(*TINKER, [0.5] * 3)]


def datum(**changes: Any) -> dict[str, Any]:
    return {"target_tokens": [6, 1, 2, 3], "logprobs": [0.0, -1.0, -2.0, -3.0], "mask": [0, 1, 1, 1]} | changes


def test_tinker_as_json(tmp_path: Path) -> None:
    chunks = {"chunks": [{"tokens": [5, 6], "type": "encoded_text"}, {"tokens": [1, 2]}]}
    tensors = {key: {"data": value, "dtype": "float32", "shape": [4]} for key, value in datum().items()}
    for number, record in enumerate(
        [{"model_input": chunks, "loss_fn_inputs": tensors}, {"model_input": [5, 6, 1, 2], **datum()}]
    ):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
        assert columns(tmp_path / f"{number}.jsonl", *LISTS) == [TINKER]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_tokens": [5, 6, 1, 2]}, "that are not its 4 input tokens shifted by one"),
        ({"mask": None}, "has no mask, which says where its response begins"),
        ({"logprobs": [-1.0]}, "has 1 rollout_logprobs for 4 target_tokens"),
    ],
)
def test_tinker_refusals(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"model_input": [5, 6, 1, 2], **datum(**change)}))
    with pytest.raises(IngestError, match=said):
        rows(tmp_path / "x.jsonl")
