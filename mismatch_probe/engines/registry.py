"""Engines by name. What is here is known before an engine starts, and imports no package of any engine.

An engine is one module with an `ENGINE`: `mismatch_probe.engines.NAME`, or of another package, which names it in the
entry point group `mismatch_probe.engines`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mismatch_probe.engines.devices import Device, EngineSettings
from mismatch_probe.errors import EngineMissing, UsageError
from mismatch_probe.types import Dtype, TrainerDtype

if TYPE_CHECKING:
    from mismatch_probe.engines.base import RolloutEngine, RolloutJob, TrainerEngine, TrainerJob

GROUP = "mismatch_probe.engines"


class Engine:
    """An engine before it starts. Each one overrides what it has; its packages are imported inside of the methods.

    Attributes:
        name: As jobs and passes call it.
        packages: What it needs, as imported.
        install: The line that installs them.
    """

    name: str
    packages: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        return f"Run: pip install {' '.join(self.packages)}."

    def rollout(self, job: RolloutJob) -> RolloutEngine:
        """Starts the sampling side."""
        raise UsageError(f"The engine {self.name} does not sample.", "Name another rollout engine.")

    def trainer(self, job: TrainerJob) -> TrainerEngine:
        """Starts the training side."""
        raise UsageError(f"The engine {self.name} is not a trainer.", "Name another trainer engine.")

    def rollout_settings(
        self, device: Device, dtype: Dtype, *, eager: bool, in_process: bool, kv_cache_gib: int
    ) -> EngineSettings:
        """Arguments and environment of a process that samples, see `engines.vllm.settings`."""
        return EngineSettings()

    def trainer_settings(self, device: Device, dtype: TrainerDtype) -> EngineSettings:
        """Flags and environment of a process that trains, see `engines.hf.settings`."""
        return EngineSettings()

    def import_ahead(self) -> None:
        """Imports what takes time, while another engine may still be at work.

        Raises:
            EngineMissing: A package of the engine is not installed.
        """
        for package in self.packages:
            try:
                import_module(package)
            except ModuleNotFoundError as error:
                if error.name != package:
                    raise
                raise EngineMissing(
                    f"The engine {self.name} needs {package}, which is not installed.", self.install
                ) from None


def find(name: str) -> Engine:
    """The engine of a name.

    Raises:
        UsageError: There is none.
        EngineMissing: The package that brings it does not import.
    """
    if name.isidentifier() and find_spec(f"{GROUP}.{name}") is not None:
        engine = getattr(import_module(f"{GROUP}.{name}"), "ENGINE", None)
        if isinstance(engine, Engine):
            return engine
    for entry in entry_points(group=GROUP, name=name):
        try:
            found = entry.load()
        except ImportError as error:
            raise EngineMissing(
                f"The engine {name} does not import: {error}.", f"Install {entry.value} again."
            ) from error
        if isinstance(found, Engine):
            return found
        raise UsageError(
            f"The entry point of the engine {name}, {entry.value}, is not an Engine.", "Correct its package."
        )
    raise UsageError(f"There is no engine {name!r}.", "Use vllm, hf, or one that an installed package brings.")
