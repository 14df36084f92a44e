"""OpenRLHF: an `Experience` that its own class holds, by `torch.save` and `pickle.dump`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mismatch_probe.errors import IngestError
from tests.ingest.formats.tensors import columns, rows

WRITTEN = Path(__file__).parent / "written"


@pytest.mark.parametrize("name", ["openrlhf.pt", "openrlhf.pkl"])
def test_actions_end_with_the_sequence(name: str) -> None:
    keys = ("prompt_token_ids", "response_token_ids", "rollout_logprobs", "trainer_logprobs", "loss_mask", "reward")
    assert columns(WRITTEN / name, *keys) == [
        ([5, 6], [1, 2], [-1.5, -2.5], [-1.0, -2.0], [True, True], 1.0),
        ([7], [3, 4, 8, 9], [-3.5, 0.0, -4.5, -5.5], [-3.0, 0.0, -4.0, -5.0], [True, False, True, True], 0.0),
    ]


def test_missing_key_is_named(tmp_path: Path) -> None:
    fields = {key: torch.ones(1, 3) for key in ("sequences", "action_mask", "action_log_probs")}
    torch.save(fields | {"attention_mask": None}, tmp_path / "x.pt")
    with pytest.raises(IngestError, match="has no attention_mask"):
        rows(tmp_path / "x.pt")
