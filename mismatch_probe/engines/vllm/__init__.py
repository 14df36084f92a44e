"""The rollout engine vLLM: the only folder that knows its insides. Importing it imports nothing of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.engines.devices import Device, EngineSettings, gpu_present, install_hint
from mismatch_probe.engines.registry import Engine
from mismatch_probe.engines.vllm.settings import rollout_settings
from mismatch_probe.types import Dtype

if TYPE_CHECKING:
    from mismatch_probe.engines.vllm.engine import VllmRollout


class Vllm(Engine):
    """vLLM on the sampling side."""

    name = "vllm"
    packages = ("vllm",)

    @property
    def install(self) -> str:
        return install_hint("cuda" if gpu_present() else "cpu")

    def rollout(self, job: RolloutJob) -> VllmRollout:
        from mismatch_probe.engines.vllm.engine import VllmRollout

        return VllmRollout(job)

    def rollout_settings(
        self, device: Device, dtype: Dtype, *, eager: bool, in_process: bool, kv_cache_gib: int
    ) -> EngineSettings:
        return rollout_settings(device, dtype, eager=eager, in_process=in_process, kv_cache_gib=kv_cache_gib)


ENGINE = Vllm()
