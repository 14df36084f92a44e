"""A pass of the trainer in FP32 that is added to a finished comparison, by a job that brings its own work."""

from __future__ import annotations

from dataclasses import replace

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.base import Job, TrainerJob
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import ProbeError, UsageError
from mismatch_probe.probes.preflight import Use
from mismatch_probe.probes.preflight.run import guard
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import same_model
from mismatch_probe.probes.workers import told
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import Dtype


def model_of(
    run: RunDirectory,
    config: CompareConfig,
    progress: Progress,
    bytes_per_weight: float,
    rollout_dtypes: tuple[str, ...] = (),
) -> ModelRef:
    """The run's own model, checked for what is to be done with it.

    Args:
        run: The comparison.
        config: Its settings.
        progress: Told what surprises.
        bytes_per_weight: Memory of a weight in the pass that needs most.
        rollout_dtypes: Dtypes of the rollout engine.

    Raises:
        UsageError: It has no weights.
        ModelError: Something will fail.
        TableError: Its files are no longer those of the run.
    """
    if not config.model:
        raise UsageError("This run is recorded and names no model to measure.", "Compare it again with --model.")
    model = resolve(
        config.model,
        revision=run.manifest.model.revision,
        trust_remote_code=config.trust_remote_code,
        log=progress.message,
    )
    if model.scripted:
        raise UsageError("The scripted model has no weights, so there is nothing to measure.", "Measure a real one.")
    use = Use(
        rollout_dtypes=rollout_dtypes,
        attention=config.trainer_attn,
        trust_remote_code=config.trust_remote_code,
        device=device_of(run),
        bytes_per_weight=bytes_per_weight,
        folder=run.path,
    )
    guard(model, use, progress)
    return same_model(run, model)


def device_of(run: RunDirectory) -> devices.Device:
    """Where the pass runs: on the run's device if it is here."""
    return "cuda" if run.manifest.device == "cuda" and devices.gpu_present() else "cpu"


def fp32_trainer(config: CompareConfig, model: ModelRef, device: devices.Device) -> TrainerJob:
    """The trainer in FP32, without requests of its own."""
    job = bare_trainer(config.trainer_engine, model, "float32", device, config.trust_remote_code)
    budget = int((config.memory_budget_gib or 0) * devices.GIB) or job.memory_budget
    return replace(job, attention=config.trainer_attn, temperature=config.temperature, memory_budget=budget)


def bare_trainer(
    engine: str, model: ModelRef, dtype: Dtype, device: devices.Device, trust_remote_code: bool
) -> TrainerJob:
    """A trainer with padded batches at temperature 1 and the device's memory budget, without requests of its own."""
    return TrainerJob(
        engine=engine,
        model_path=str(model.path),
        dtype=dtype,
        mode="cast",
        layout="padded",
        attention=None,
        device=device,
        temperature=1.0,
        requests=(),
        self_noise_sequences=0,
        memory_budget=int(devices.default_sizes(device).memory_budget_gib * devices.GIB),
        trust_remote_code=trust_remote_code,
        flags=registry.find(engine).trainer_settings(device, dtype).arguments,
    )


def run_pass(
    run: RunDirectory,
    job: Job,
    trainer: TrainerJob,
    name: str,
    text: str,
    progress: Progress,
) -> None:
    """Runs the job in a process of its own.

    Args:
        run: Whose folder takes the log.
        job: What to do.
        trainer: The engine that it works with.
        name: Of the pass; also the log's.
        text: What its progress is headed with.
        progress: Told about it.

    Raises:
        ProbeError: The engine failed.
    """
    progress.begin(name, text)
    settings = registry.find(trainer.engine).trainer_settings(device_of(run), trainer.dtype)
    process = EngineProcess(trainer.engine, settings.environment, run.path / "logs" / f"{name}.log")
    try:
        process.run(job, lambda event: told(progress, name, event))
    except ProbeError as error:
        progress.end(name, str(error))
        raise
    progress.end(name, "done")
