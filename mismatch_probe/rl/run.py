"""One RL run from the outside: its folder, its process, how it ended. Imports no engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch_probe.engines import devices
from mismatch_probe.engines.models import ModelRef, resolve
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK, Interrupted, TableError
from mismatch_probe.files import locked
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import default_folder
from mismatch_probe.resources import data_path
from mismatch_probe.rl.config import RlConfig, TaskSettings
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.worker import RlJob
from mismatch_probe.tables import refuse_occupied

CHAIN = "chain"
FIGURE = "figures/run.png"


@dataclass(frozen=True)
class RlResult:
    """A run that has ended.

    Attributes:
        path: Its folder.
        result: What `result.json` says: `status` is `complete`, `collapsed` or `diverged`.
    """

    path: Path
    result: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        return EXIT_OK if self.result["status"] == "complete" else EXIT_LIMIT

    def steps(self) -> pd.DataFrame:
        """A row per step."""
        return RlDirectory.open(self.path).steps()

    def lines(self) -> list[str]:
        """How it ended, for people."""
        result, config = self.result, RlDirectory.open(self.path).config
        clean = "" if result["clean_reward"] is None else f", clean weights in FP32 {result['clean_reward']:.3f}"
        steps = self.steps()
        last = steps["reward"].tail(config.pass_window).mean() if len(steps) else float("nan")
        found = [
            f"{result['status']} after {result['steps']} steps: reward {last:.3f} (sampled policy, last "
            f"{min(len(steps), config.pass_window)} steps){clean}",
        ]
        if result["why"]:
            found.append(str(result["why"]))
        if result["status"] != "complete":
            found.append(f"Last healthy checkpoint: {result['last_healthy_checkpoint'] or 'none was written yet'}")
        if config.stress != "none":
            found.append(f"Stress {config.stress} {config.dose:g}: injected stress, not precision.")
        threshold, first = f"{100 * config.pass_above:g} %", result["first_above_step"]
        found.append(
            f"Sanity test (last {config.pass_window} steps, lower 95 % limit above {threshold}): "
            + ("passed" if result["passed"] else "not passed")
            + ("" if first is None else f"; the first window above ended at step {first}")
        )
        found.append(f"Figure: {self.path / FIGURE}")
        return found


def resolve_model(config: TaskSettings, progress: Progress) -> ModelRef:
    """The initial model; `chain` is the one that comes with the tool."""
    if config.model != CHAIN:
        return resolve(config.model, revision=config.revision, log=progress.message)
    return resolve(str(data_path(f"rl/{CHAIN}/config.json").parent))


def same_model(config: TaskSettings, manifest: Mapping[str, Any], progress: Progress) -> ModelRef:
    """The model of a folder that is gone on with.

    Raises:
        TableError: Its files are no longer those of the manifest.
    """
    model = resolve_model(config, progress)
    if model.file_hashes() != manifest["model"]["files"]:
        raise TableError("The model's files have changed since this run began.", "Start a new run.")
    return model


def new_rl_run(config: RlConfig, out: str | Path | None, progress: Progress | None) -> RlResult:
    """Makes a run folder and trains.

    Raises:
        ProbeError: The model, the device or the folder cannot be had, or the engine failed.
    """
    progress = progress or Progress()
    model, device = resolve_model(config, progress), devices.choose_device(config.device)
    path = Path(out) if out is not None else default_folder(f"rl-{Path(config.model).name}")
    refuse_occupied(path)
    with locked(path):
        return _execute(RlDirectory.create(path, config, run_facts(model, device)), model, device, progress)


def resume_rl_run(path: Path, progress: Progress | None) -> RlResult:
    """Goes on from the newest checkpoint; a finished run is only reported.

    Raises:
        TableError: The folder is none of an RL run, or the model has changed.
    """
    progress = progress or Progress()
    RlDirectory.open(path)  # before the lock, which would make the folder
    with locked(path):
        directory = RlDirectory.open(path)
        result = directory.result()
        if result is not None:
            return RlResult(path, result)
        model = same_model(directory.config, directory.manifest, progress)
        return _execute(directory, model, devices.choose_device(directory.config.device), progress)


def worker_environment(config: RlConfig, device: devices.Device) -> dict[str, str]:
    """What the process of engine and trainer gets before its imports."""
    settings = devices.rollout_settings(
        device, config.rollout_dtype, eager=True, in_process=True, kv_cache_gib=config.kv_cache_gib
    )
    return settings.environment


def _execute(directory: RlDirectory, model: ModelRef, device: devices.Device, progress: Progress) -> RlResult:
    config = directory.config
    job = RlJob([str(directory.path)], str(model.path), device)
    process = EngineProcess("vllm", worker_environment(config, device), directory.path / "logs" / "rl.log")
    found: dict[str, Any] = {}

    def on_event(name: str, payload: Any) -> None:
        if name == "total":
            progress.total("rl", payload[1])
        elif name == "step":
            progress.advance("rl", 1)
            row = payload[1]
            progress.message(step_line(row))
        elif name == "message":
            progress.message(str(payload[1]))
        elif name == "result":
            found.update(payload[1])

    progress.begin("rl", "rl run")
    try:
        process.run(job, on_event)
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped; steps up to the last checkpoint are kept.",
            f"Continue with: mismatch-probe rl run --resume {directory.path}",
        ) from None
    progress.end("rl", str(found["status"]))
    draw_run(directory)
    return RlResult(directory.path, found)


def draw_run(directory: RlDirectory) -> Path:
    """Draws the run's figure from its steps."""
    from mismatch_probe.report.figures import save
    from mismatch_probe.report.figures.rl import run_figure

    return save(run_figure(directory.steps()), directory.path / FIGURE)


def step_line(row: Mapping[str, Any]) -> str:
    """A step in one line."""
    gap, ess = row["mean_abs_logprob_diff"], row["ess_seq"]
    shown = ["–" if value is None else f"{value:.3g}" for value in (gap, ess, row["grad_norm"])]
    seconds = sum(row[f"seconds_{phase}"] for phase in ("rollout", "sync", "forward_backward", "other"))
    return (
        f"step {row['step']}: reward {row['reward']:.3f}, mean |Δlogp| {shown[0]}, ESS {shown[1]}, entropy "
        f"{row['entropy']:.3f}, gradient {shown[2]}, {seconds:.1f} s"
    )


def run_facts(model: ModelRef, device: str) -> dict[str, Any]:
    """What a folder says of model and machine."""
    return {
        "tool_version": version("mismatch-probe"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device,
        "model": {"name": model.name, "revision": model.revision, "files": model.file_hashes()},
        "environment": {
            "versions": devices.package_versions(),
            "machine": devices.machine(),
            "variables": devices.recorded_environment(),
        },
    }
