"""transformers on both sides: the forward pass as RL trainers run it, and `generate`. Importing it imports neither."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.devices import Device, EngineSettings, gpu_present, install_hint
from mismatch_probe.engines.hf.settings import choose_device, trainer_settings
from mismatch_probe.engines.registry import Engine
from mismatch_probe.types import Dtype, TrainerDtype

# What `--engine-arg` may name.
ARGUMENTS = ("attn_implementation",)

if TYPE_CHECKING:
    from mismatch_probe.engines.hf.engine import HfTrainer
    from mismatch_probe.engines.hf.rollout import HfRollout


class Hf(Engine):
    """transformers on either side."""

    name = "hf"
    packages = ("torch", "transformers")

    @property
    def install(self) -> str:
        return install_hint("cuda" if gpu_present() else "cpu")

    def rollout(self, job: RolloutJob) -> HfRollout:
        from mismatch_probe.engines.hf.rollout import HfRollout

        return HfRollout(job)

    def trainer(self, job: TrainerJob) -> HfTrainer:
        from mismatch_probe.engines.hf.engine import HfTrainer

        return HfTrainer(job)

    def choose_device(self, requested: str) -> Device:
        return choose_device(requested)

    def why_no_settings(self, names: Iterable[str]) -> str:
        unknown = [name for name in names if name not in ARGUMENTS]
        return f"the engine hf has no {unknown[0]}" if unknown else ""

    def rollout_settings(self, device: Device, dtype: Dtype, **how: Any) -> EngineSettings:
        """Those of a trainer: it runs eagerly, in the process itself, and its cache grows with the batch."""
        return trainer_settings(device, dtype)

    def trainer_settings(self, device: Device, dtype: TrainerDtype) -> EngineSettings:
        return trainer_settings(device, dtype)

    def import_ahead(self) -> None:
        super().import_ahead()
        from transformers import AutoModelForCausalLM  # noqa: F401

        import mismatch_probe.engines.hf.engine  # noqa: F401


ENGINE = Hf()
