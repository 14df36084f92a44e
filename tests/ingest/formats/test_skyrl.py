"""SkyRL: a batch pickled as its `TensorBatch` pickles itself; the class is built here from the documented facts."""

from __future__ import annotations

import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mismatch_probe.errors import IngestError
from tests.ingest.formats.tensors import columns, rows

MODULE = "skyrl_of_the_tests"
KEYS = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask", "reward")
BATCH = {
    "sequences": torch.tensor([[0, 5, 6, 1, 2], [7, 8, 9, 3, 4]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    "response_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    "loss_mask": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]),
    "action_log_probs": torch.tensor([[0.0, -1.0, -2.0], [-3.0, -4.0, -5.0]]),
    "rollout_logprobs": torch.tensor([[0.0, -1.5, -9999.0], [-3.5, -4.5, -5.5]], dtype=torch.bfloat16),
    "rewards": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.5]]),
    "values": None,
}
EXPECTED = [
    ([5, 6], [1, 2], [-1.5, float(torch.tensor(-9999.0).bfloat16())], [-1.0, -2.0], [True, True], 1.0),
    ([7, 8], [9, 3, 4], [-3.5, -4.5, -5.5], [-3.0, -4.0, -5.0], [True, False, True], 0.5),
]


def encoded(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return {"format": "torch", "data": buffer.getvalue()}
    array = tensor.numpy()
    return {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}


def dump(path: Path, metadata: Any = None) -> Path:
    """Writes with a module that is gone when the file is read."""
    module = sys.modules[MODULE] = types.ModuleType(MODULE)

    def _rebuild_tensor_batch(cls: Any, state: Any) -> None:
        raise AssertionError("this is never called")

    class TrainingInputBatch(dict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            state = {"batch_dict": {key: encoded(value) for key, value in self.items()}, "batch_size": 2}
            return _rebuild_tensor_batch, (TrainingInputBatch, state | {"device": None, "metadata": metadata})

    for made in (_rebuild_tensor_batch, TrainingInputBatch):
        made.__module__, made.__qualname__ = MODULE, made.__name__
        setattr(module, made.__name__, made)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(TrainingInputBatch(BATCH)))
    del sys.modules[MODULE]
    return path


def test_steps_of_a_folder(tmp_path: Path) -> None:
    for step in (10, 9):
        dump(tmp_path / f"dumped_data/global_step_{step}_training_input.pkl", {"uids": ["x", "y"]})
    found = columns(tmp_path, *KEYS, "step", "prompt_id")
    assert found == [(*row, step, name) for step in (9, 10) for row, name in zip(EXPECTED, "xy", strict=True)]


def test_plain_dict_of_arrays(tmp_path: Path) -> None:
    fields = {key: None if value is None else value.float().numpy() for key, value in BATCH.items()}
    fields["sequences"] = BATCH["sequences"].numpy()  # type: ignore[union-attr]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(fields))
    assert columns(tmp_path / "x.pkl", *KEYS) == EXPECTED


def test_responses_padded_on_the_right_as_before(tmp_path: Path) -> None:
    fields = {
        "sequences": np.array([[0, 5, 1, 2, 0]]),
        "attention_mask": np.array([[0, 1, 1, 1, 0]]),
        "response_mask": np.array([[1, 1, 0]]),
        "loss_mask": np.array([[1, 1, 0]]),
        "action_log_probs": np.array([[-1.0, -2.0, 0.0]]),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(fields))
    assert columns(tmp_path / "x.pkl", *KEYS[:2], KEYS[3]) == [([5], [1, 2], [-1.0, -2.0])]


def test_refusals(tmp_path: Path) -> None:
    fields = {key: np.ones((1, 3)) for key in ("sequences", "attention_mask", "loss_mask", "response_mask")}
    for change, said in (
        ({"response_mask": np.ones((1, 4))}, "has a mask of 4 for 3 ids"),
        ({"attention_mask": np.ones((1, 2))}, "has 2 attention_mask for 3 ids"),
        ({"action_log_probs": np.ones((1, 2))}, "has 2 trainer_logprobs for a response that begins at 0 of 3 ids"),
        ({"sequences": np.array([["a"]])}, "has sequences that is 1-dimensional <U1, not a list of numbers"),
    ):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(fields | change))
        with pytest.raises(IngestError, match=said):
            rows(tmp_path / "x.pkl")
