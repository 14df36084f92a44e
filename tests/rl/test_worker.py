"""What an RL run asks of its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.worker import RlJob, _engine_job
from tests.factories.rl_run import PROVENANCE


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("changes", "noise"),
    [({"stress": "logit-noise", "dose": 0.1}, True), ({"remedy": "zero-mismatch"}, True), ({}, False)],
)
def test_noise_is_the_engines_to_add_on_either_model_runner(
    tmp_path: Path, device: str, changes: dict[str, Any], noise: bool
) -> None:
    plain = RlDirectory.create(tmp_path / "plain", RlConfig(), PROVENANCE)
    other = RlDirectory.create(tmp_path / "other", RlConfig.of(changes), PROVENANCE)
    job = _engine_job([plain, other], RlJob([], "a folder", device), longest_prompt=10)
    assert job.logit_noise is noise
    # A class named here would be of one interface, which the other model runner refuses.
    assert "logits_processors" not in job.arguments
