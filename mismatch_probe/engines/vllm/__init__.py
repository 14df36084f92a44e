"""The rollout engine vLLM: the only folder that knows its insides. Importing it imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.engines.devices import Device, EngineSettings, gpu_present, install_hint
from mismatch_probe.engines.registry import Engine
from mismatch_probe.engines.vllm.settings import choose_device, in_process_wanted, rollout_settings
from mismatch_probe.engines.vllm.unsupported import why_no_dtype
from mismatch_probe.types import Dtype

if TYPE_CHECKING:
    from mismatch_probe.engines.vllm.engine import VllmRollout


class Vllm(Engine):
    """vLLM on the sampling side."""

    name = "vllm"
    packages = ("vllm",)
    shows_inside = True
    own_process = True

    @property
    def install(self) -> str:
        return install_hint("cuda" if gpu_present() else "cpu")

    def rollout(self, job: RolloutJob) -> VllmRollout:
        from mismatch_probe.engines.vllm.engine import VllmRollout

        return VllmRollout(job)

    def import_ahead(self) -> None:
        super().import_ahead()
        from vllm import LLM  # noqa: F401  # `import vllm` alone leaves more than half of the work for later

    def choose_device(self, requested: str) -> Device:
        return choose_device(requested)

    def in_process_wanted(self) -> bool:
        return in_process_wanted()

    def why_no_dtype(self, config: Mapping[str, Any], dtype: str) -> str:
        return why_no_dtype(config, dtype)

    def why_no_replay(self, device: Device, temperature: float) -> str:
        if device == "cpu" and temperature != 1:
            return "On a CPU vLLM cannot decode given ids again at a temperature other than 1."
        return ""

    def rollout_settings(
        self,
        device: Device,
        dtype: Dtype,
        *,
        eager: bool,
        in_process: bool,
        kv_cache_gib: int,
        beside_trainer: float | None = None,
    ) -> EngineSettings:
        return rollout_settings(
            device,
            dtype,
            eager=eager,
            in_process=in_process,
            kv_cache_gib=kv_cache_gib,
            beside_trainer=beside_trainer,
        )


ENGINE = Vllm()
