"""transformers as a trainer, the forward pass as RL trainers run it. Importing it imports nothing of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.engines.base import TrainerJob
from mismatch_probe.engines.devices import Device, EngineSettings, gpu_present, install_hint
from mismatch_probe.engines.hf.settings import trainer_settings
from mismatch_probe.engines.registry import Engine
from mismatch_probe.types import TrainerDtype

if TYPE_CHECKING:
    from mismatch_probe.engines.hf.engine import HfTrainer


class Hf(Engine):
    """transformers on the training side."""

    name = "hf"
    packages = ("torch", "transformers")

    @property
    def install(self) -> str:
        return install_hint("cuda" if gpu_present() else "cpu")

    def trainer(self, job: TrainerJob) -> HfTrainer:
        from mismatch_probe.engines.hf.engine import HfTrainer

        return HfTrainer(job)

    def trainer_settings(self, device: Device, dtype: TrainerDtype) -> EngineSettings:
        return trainer_settings(device, dtype)

    def import_ahead(self) -> None:
        super().import_ahead()
        from transformers import AutoModelForCausalLM  # noqa: F401

        import mismatch_probe.engines.hf.engine  # noqa: F401


ENGINE = Hf()
