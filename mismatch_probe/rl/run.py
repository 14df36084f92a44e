"""One RL run from the outside: its folder, its process, its report. Imports no engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.events import Event, Found, InRun, Message, RunEnded, StepDone, Total
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK, TableError
from mismatch_probe.files import data_path
from mismatch_probe.probes.preflight import Use
from mismatch_probe.probes.preflight.run import guard
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.data import RlRunData
from mismatch_probe.report.model import Report
from mismatch_probe.report.words import say
from mismatch_probe.results.rl_run import Environment, Machine, Provenance, RlRun, TrainedModel
from mismatch_probe.rl.config import RlConfig, TaskSettings, precision_label
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.worker import RlJob
from mismatch_probe.runs.folder import RL_RUN, continued_by, new_folder

CHAIN = "chain"


@dataclass(frozen=True)
class RlResult:
    """An RL run and what it shows.

    Attributes:
        path: Its folder.
        data: What its report shows.
        figures: Figure files by name.
    """

    path: Path
    data: RlRunData
    figures: dict[str, Path]

    @property
    def document(self) -> RlRun:
        """The content of `run.json`."""
        return self.data.run

    @property
    def exit_code(self) -> int:
        ending = self.document.ending
        return EXIT_OK if ending is None or ending.status == "complete" else EXIT_LIMIT

    def steps(self) -> pd.DataFrame:
        """A row per step."""
        return self.data.steps

    def report(self) -> Report:
        """The report."""
        from mismatch_probe.report.rl_run import rl_run_report

        return rl_run_report(self.data)


def resolve_model(config: TaskSettings, progress: Progress) -> ModelRef:
    """The initial model; `chain` is the one that comes with the tool."""
    if config.model == CHAIN:
        return resolve(str(data_path(f"rl/{CHAIN}/config.json").parent))
    model = resolve(config.model, revision=config.revision, log=progress.message)
    use = Use(
        rollout_dtypes=(config.rollout_dtype,),
        chat=config.chat,
        max_tokens=config.max_tokens,
        device=devices.choose_device(config.device),
        bytes_per_weight=DTYPE_INFOS["float32"].bytes,
    )
    guard(model, use, progress)
    return model


def same_model(config: TaskSettings, files: Mapping[str, str], progress: Progress) -> ModelRef:
    """The model of a folder that is continued.

    Args:
        config: Names the model.
        files: SHA-256 of its files when the folder was made.

    Raises:
        TableError: Its files have changed.
    """
    model = resolve_model(config, progress)
    if model.file_hashes() != files:
        raise TableError("The model's files have changed since this run began.", "Start a new run.")
    return model


def new_rl_run(config: RlConfig, out: str | Path | None, progress: Progress | None) -> RlResult:
    """Makes a run folder and trains.

    Raises:
        ProbeError: The model, the device or the folder cannot be had, or the engine failed.
    """
    progress = progress or Progress()
    model, device = resolve_model(config, progress), devices.choose_device(config.device)
    with new_folder(out, f"rl-{Path(config.model).name}") as path:
        return _execute(RlDirectory.create(path, config, provenance_of(model, device)), model, device, progress)


def resume_rl_run(path: Path, progress: Progress | None) -> RlResult:
    """Goes on from the newest checkpoint; a finished run is only reported.

    Raises:
        TableError: The folder is none of an RL run, or the model has changed.
    """
    progress = progress or Progress()
    with RlDirectory.reopened(path) as directory:
        if directory.document.ending is not None:
            return write_rl_run(directory)
        model = same_model(directory.config, directory.document.provenance.model.files, progress)
        return _execute(directory, model, devices.choose_device(directory.config.device), progress)


def worker_environment(config: RlConfig, device: devices.Device) -> dict[str, str]:
    """What the process of engine and trainer gets before its imports."""
    settings = registry.find("vllm").rollout_settings(
        device, config.rollout_dtype, eager=True, in_process=True, kv_cache_gib=config.kv_cache_gib
    )
    return settings.environment


def _execute(directory: RlDirectory, model: ModelRef, device: devices.Device, progress: Progress) -> RlResult:
    config = directory.config
    job = RlJob([str(directory.path)], str(model.path), device)
    process = EngineProcess("vllm", worker_environment(config, device), directory.path / "logs" / "rl.log")
    ended = "no result"

    def on_event(event: Event) -> None:
        nonlocal ended
        match event:
            case InRun(event=Total(amount)):
                progress.total("rl", amount)
            case InRun(event=StepDone(row)):
                progress.advance("rl", 1)
                progress.message(step_line(row))
            case InRun(event=Found(finding)):
                progress.message(say(finding))
            case InRun(event=Message(text)):
                progress.message(text)
            case InRun(event=RunEnded(ending)):
                ended = str(ending.status)

    progress.begin("rl", "rl run")
    with continued_by(RL_RUN.resume(directory.path), "steps up to the last checkpoint are kept"):
        process.run(job, on_event)
    progress.end("rl", ended)
    return write_rl_run(RlDirectory.open(directory.path))


def write_rl_run(directory: RlDirectory) -> RlResult:
    """Computes what a run's steps show, and writes its document, figure and report."""
    from mismatch_probe.report.figures import draw
    from mismatch_probe.report.render import write_report
    from mismatch_probe.report.rl_run import rl_run_report

    steps = directory.steps()
    directory.summarise(steps)
    data = run_data(directory, steps)
    figures = draw(data, directory.path / "figures")
    write_report(rl_run_report(data), figures, directory.path)
    return RlResult(directory.path, data, figures)


def run_data(directory: RlDirectory, steps: pd.DataFrame) -> RlRunData:
    """What the report of a run shows."""
    config = directory.config
    return RlRunData(
        folder=str(directory.path),
        model=Path(config.model).name,
        run=directory.document,
        steps=steps,
        precision=precision_label(config),
        algorithm=config.algorithm,
        task=config.task,
        exact=config.rollout_dtype == config.trainer_dtype == "float32",
        stressed=config.stress != "none",
        recorded=(directory.path / "rollouts.parquet").exists(),
        seed=config.seed,
        learning_rate=config.learning_rate,
        planned=config.steps,
    )


def step_line(row: Mapping[str, Any]) -> str:
    """A step in one line."""
    gap, ess = row["mean_abs_logprob_diff"], row["ess_seq"]
    shown = ["–" if value is None else f"{value:.3g}" for value in (gap, ess, row["grad_norm"])]
    seconds = sum(row[f"seconds_{phase}"] for phase in ("rollout", "sync", "forward_backward", "other"))
    return (
        f"step {row['step']}: reward {row['reward']:.3f}, mean |d| {shown[0]}, ESS {shown[1]}, entropy "
        f"{row['entropy']:.3f}, gradient {shown[2]}, {seconds:.1f} s"
    )


def provenance_of(model: ModelRef, device: str) -> Provenance:
    """What a folder says of model and machine."""
    machine = devices.machine()
    return Provenance(
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        device=device,
        model=TrainedModel(name=model.name, revision=model.revision, files=model.file_hashes()),
        environment=Environment(
            versions=devices.package_versions(),
            machine=Machine(**machine),
            variables=devices.recorded_environment(),
        ),
    )
