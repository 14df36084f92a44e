"""Every fault of a weight sync, planted between the real trainer and the real engine, must be caught and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.engines.devices import Device, rollout_settings
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.types import Dtype
from tests.real.rl_jobs import SyncFaultsJob

pytestmark = pytest.mark.engine


def _said(checkpoint: Path, folder: Path, dtype: Dtype, step_size: float, device: Device) -> dict[str, str]:
    settings = rollout_settings(device, dtype, eager=True, in_process=True, kv_cache_gib=1)
    process = EngineProcess("vllm", settings.environment, folder / "vllm.log")
    said: dict[str, str] = {}

    def on_event(name: str, payload: Any) -> None:
        if name == "texts":
            said.update(payload)

    process.run(SyncFaultsJob(str(checkpoint), dtype, step_size, device), on_event)
    return said


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "step_size"), [("float32", 1e-3), ("bfloat16", 6e-3), ("float16", 1e-3)])
def test_every_fault_is_caught_and_named(
    tiny: Callable[[str], Path], tmp_path: Path, device: Device, dtype: Dtype, step_size: float
) -> None:
    said = _said(tiny("qwen3"), tmp_path, dtype, step_size, device)
    assert said["none"].startswith("gap "), said
    if dtype == "float32":
        assert float(said["none"].split()[1]) < 1e-5
    assert "stale" in said["stale"], said
    assert "model.layers.1.mlp.down_proj.weight did not arrive" in said["partial"], said
    # A head that is not packed follows the embedding by itself: vLLM packs none on a GPU, and in float16 it depends on
    # the CPU.
    named = "lm_head.weight did not arrive" in said["tied"]
    assert named or (said["tied"].startswith("gap ") and (dtype == "float16" or device == "cuda")), said
    if dtype != "bfloat16":  # there it is what the engine does anyway
        assert "bfloat16" in said["cast"], said
    assert "lacks lm_head.weight" in said["names"], said
