"""Engines by name. What is here is known before an engine starts, and imports no package of any engine.

An engine is one module with an `ENGINE`: `mismatch_probe.engines.NAME`, or of another package, which names it in the
entry point group `mismatch_probe.engines`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from mismatch_probe.engines.devices import Device, EngineSettings, default_device
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
        shows_inside: Whether its rollout engine has `trace`, `routes` and `generate_routed`.
        own_process: Whether its rollout engine can run in a process of its own where it fails in-process.
    """

    name: str
    packages: tuple[str, ...] = ()
    shows_inside: bool = False
    own_process: bool = False

    @property
    def install(self) -> str:
        return f"Run: pip install {' '.join(self.packages)}."

    def rollout(self, job: RolloutJob) -> RolloutEngine:
        """Starts the sampling side."""
        raise NotImplementedError

    def trainer(self, job: TrainerJob) -> TrainerEngine:
        """Starts the training side."""
        raise NotImplementedError

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
        """Arguments and environment of a process that samples.

        Args:
            device: Where it runs.
            dtype: What it runs in.
            eager: The user's `--eager`.
            in_process: Whether the engine runs in the process itself, rather than in one of its own.
            kv_cache_gib: KV cache on a CPU.
            beside_trainer: Fraction of a GPU's memory where a trainer in the same process changes its weights; None
                where it has the device to itself.
        """
        return EngineSettings()

    def trainer_settings(self, device: Device, dtype: TrainerDtype) -> EngineSettings:
        """Flags and environment of a process that trains, see `engines.hf.settings`."""
        return EngineSettings()

    def choose_device(self, requested: str) -> Device:
        """Resolves `--device`.

        Raises:
            UsageError: The device is not here.
            EngineMissing: The engine is not installed, or not for a device that is here.
        """
        return default_device(requested)

    def in_process_wanted(self) -> bool:
        """Whether it is tried in-process first, which makes the make-up of batches repeatable."""
        return True

    def why_no_dtype(self, config: Mapping[str, Any], dtype: str) -> str:
        """Why it does not run a model in a dtype, as a sentence; empty where it does, as far as is known.

        Args:
            config: The checkpoint's `config.json`.
            dtype: Of the rollout engine.
        """
        return ""

    def why_no_replay(self, device: Device, temperature: float) -> str:
        """Why it cannot decode given ids again, as a sentence; empty where it can."""
        return ""

    def why_no_settings(self, names: Iterable[str]) -> str:
        """Why it does not take arguments (`--engine-arg`) or environment variables of these names; empty where it
        takes them, as far as is known.
        """
        return ""

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


def find(name: str, side: Literal["", "rollout", "trainer"] = "") -> Engine:
    """The engine of a name.

    Args:
        name: Its name.
        side: What it must have.

    Raises:
        UsageError: There is none, or it has not the side.
        EngineMissing: The package that brings it does not import.
    """
    engine = _find(name)
    if side and getattr(type(engine), side) is getattr(Engine, side):
        raise UsageError(f"The engine {name} is no {side} engine.", f"Name another one by --{side}-engine.")
    return engine


def _find(name: str) -> Engine:
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
