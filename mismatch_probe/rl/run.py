"""One RL run from the outside: its folder, its process, its report. Imports no engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.attribute.trace import why_no_routes
from mismatch_probe.engines.events import Event, Found, InRun, Message, RunEnded, StepDone, Total
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK, UsageError
from mismatch_probe.files import data_path
from mismatch_probe.probes.preflight import Use
from mismatch_probe.probes.preflight.run import guard
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session, check_device, same_model, write_pages
from mismatch_probe.report.data import RlRunData
from mismatch_probe.report.model import Report
from mismatch_probe.report.words import say
from mismatch_probe.results.rl_run import Provenance, RlRun, TrainedModel
from mismatch_probe.rl.config import RlConfig, TaskSettings, precision_label
from mismatch_probe.rl.records import RlDirectory, checkpoints, step_of
from mismatch_probe.rl.worker import RlJob, engine_settings
from mismatch_probe.runs.folder import RunFolder, run_folder

# Models that come with the tool, each for the tasks of its name.
BUNDLED = ("chain", "lines")


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


def resolve_model(
    configs: Sequence[TaskSettings], progress: Progress, out: str | Path | None = None, at_once: int = 1
) -> ModelRef:
    """The initial model, one that comes with the tool or another.

    Args:
        configs: Of a run, or of all runs of a sweep; the first names the model.
        progress: Told what takes long, and what surprises.
        out: Folder of the run; None for one under `runs/`.
        at_once: Runs that share the device's memory.

    Raises:
        ModelError: There is no such model, or something will fail.
        UsageError: A model that comes with the tool is to learn the task of another.
    """
    config = configs[0]
    if config.model in BUNDLED:
        if config.task in BUNDLED and config.task != config.model:
            what = f"The model {config.model} does not know the task {config.task}."
            raise UsageError(what, f"Add --task {config.model}, or name another model.")
        return resolve(str(data_path(f"rl/{config.model}/config.json").parent))
    model = resolve(config.model, revision=config.revision, log=progress.message)
    use = Use(
        rollout_dtypes=tuple(dict.fromkeys(one.rollout_dtype for one in configs)),
        chat=config.chat,
        max_tokens=config.max_tokens,
        device=device_of(config),
        rollout_engine=config.rollout_engine,
        bytes_per_weight=at_once * max(one.bytes_per_weight for one in configs),
        disk_bytes=int(sum(one.disk_bytes_per_weight for one in configs) * model.checkpoint().parameters),
        folder=run_folder(out),
    )
    guard(model, use, progress)
    return model


def check_remedy(config: TaskSettings, model: ModelRef) -> None:
    """Raises:
    UsageError: A run is to replay routes, and the model or the engine has none to show.
    """
    if not isinstance(config, RlConfig) or config.remedy != "routing-replay":
        return
    why = why_no_routes(model.config)
    if not registry.find(config.rollout_engine).shows_inside:
        why = f"the engine {config.rollout_engine} does not show its routers"
    if why:
        raise UsageError(
            f"--remedy routing-replay is impossible here: {why}.",
            "Leave --remedy out, or train a mixture of experts with --rollout-engine vllm.",
        )


def check_start(config: TaskSettings) -> None:
    """Raises:
    UsageError: A run is to go on from a checkpoint that is none, or that has all of its steps.
    """
    if not isinstance(config, RlConfig) or config.start_from is None:
        return
    path = Path(config.start_from)
    if path not in checkpoints(path.parent):
        raise UsageError(f"--start-from {path} is no checkpoint.", "Name one, like RUN/checkpoints/step-000050.")
    done = step_of(path)
    if done >= config.steps:
        raise UsageError(f"--start-from {path} has {done} steps, and --steps is {config.steps}.", "Raise --steps.")


def device_of(config: TaskSettings) -> devices.Device:
    """Where engine and trainer run."""
    return registry.find(config.rollout_engine, "rollout").choose_device(config.device)


@dataclass(frozen=True)
class Start:
    """What a run of `rl` trains or samples, and where.

    Attributes:
        model: The initial model.
        device: Of engine and trainer.
    """

    model: ModelRef
    device: devices.Device

    @classmethod
    def of(
        cls,
        configs: Sequence[TaskSettings],
        progress: Progress,
        out: str | Path | None = None,
        at_once: int = 1,
    ) -> Start:
        """Of a new run; arguments as in `resolve_model`.

        Raises:
            ProbeError: The model or the device cannot be had, or a remedy cannot be used with them.
        """
        start = cls(resolve_model(configs, progress, out, at_once), device_of(configs[0]))
        for config in configs:
            check_remedy(config, start.model)
            check_start(config)
        return start

    @classmethod
    def again(cls, run: RunFolder[Any], configs: Sequence[TaskSettings], progress: Progress, at_once: int = 1) -> Start:
        """Of a run that goes on; arguments as in `resolve_model`.

        Raises:
            TableError: The model's files have changed.
            UsageError: It began on another device.
        """
        start = cls.of(configs, progress, run.path, at_once)
        check_device(run, start.device)
        same_model(run, start.model)
        return start

    def provenance(self) -> Provenance:
        """What a folder says of model and machine."""
        model = self.model
        return Provenance(
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            device=self.device,
            model=TrainedModel(name=model.name, revision=model.revision, files=model.file_hashes()),
            environment=devices.environment(),
        )


def new_rl_run(config: RlConfig, out: str | Path | None, progress: Progress | None) -> RlResult:
    """Makes a run folder and trains.

    Raises:
        ProbeError: The model, the device or the folder cannot be had, or the engine failed.
    """
    progress = progress or Progress()
    start = Start.of([config], progress, out)
    with Session.new(
        lambda path: RlDirectory.create(path, config, start.provenance()),
        f"rl-{Path(config.model).name}",
        out,
        progress,
    ) as session:
        return _execute(session, start)


def resume_rl_run(path: Path, progress: Progress | None) -> RlResult:
    """Goes on from the newest checkpoint; a finished run is only reported.

    Raises:
        TableError: The folder is none of an RL run, or the model has changed.
    """
    with Session.resume(RlDirectory, path, progress) as session:
        if session.complete:
            return write_rl_run(session.run)
        return _execute(session, Start.again(session.run, [session.run.config], session.progress))


def _execute(session: Session[RlDirectory], start: Start) -> RlResult:
    path, config, progress = session.run.path, session.run.config, session.progress
    job = RlJob([str(path)], str(start.model.path), start.device)
    environment = engine_settings(config, start.device).environment
    process = EngineProcess(config.rollout_engine, environment, path / "logs" / "rl.log")
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
    with session.stoppable("steps up to the last checkpoint are kept"):
        process.run(job, on_event)
    progress.end("rl", ended)
    return write_rl_run(RlDirectory.open(path))


def write_rl_run(directory: RlDirectory) -> RlResult:
    """Computes what a run's steps show, and writes its document, figure and report."""
    from mismatch_probe.report.rl_run import rl_run_report

    steps = directory.steps()
    directory.summarise(steps)
    data = run_data(directory, steps)
    return RlResult(directory.path, data, write_pages(data, rl_run_report, directory.path))


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
