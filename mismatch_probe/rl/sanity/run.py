"""A sanity set from the outside: its folder, its process, what was found. Imports no engine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mismatch_probe.engines import devices
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.errors import Interrupted
from mismatch_probe.files import locked
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import default_folder
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.run import provenance_of, resolve_model, same_model
from mismatch_probe.rl.sanity.config import SanityConfig
from mismatch_probe.rl.sanity.records import SET, SanityDirectory
from mismatch_probe.rl.sanity.worker import SanityJob, settings_of
from mismatch_probe.rl.tasks import read_problems
from mismatch_probe.tables import refuse_occupied

_PASS = "sanity-set"
# What a run on the set has to share with its sampling.
_SHARED = ("revision", "max_tokens", "temperature", "chat", "device")


@dataclass(frozen=True)
class SanityResult:
    """A sanity set that is finished.

    Attributes:
        path: Its folder.
        statistics: What `statistics.json` says.
    """

    path: Path
    statistics: Mapping[str, Any]

    @property
    def problems(self) -> Path:
        """The set: a file that `--problems` of `rl run` takes."""
        return self.path / SET

    def lines(self) -> list[str]:
        """What was found, for people."""
        found, config = self.statistics, self.statistics["config"]
        low, high = found["keep"]
        counts, tokens = found["problems_by_right"], found["response_tokens"]
        lines = [
            f"Kept {found['n_kept']} of {found['n_problems']} problems: accuracy within [{low:g}, {high:g}], "
            f"{found['n_samples']} samples each, {config['rollout_dtype']} at temperature {config['temperature']:g}",
            f"Below: {found['n_below']} (never right: {counts[0]}); above: {found['n_above']} (always right: "
            f"{counts[-1]}); accuracy over all: {found['accuracy']:.3f}",
            f"Responses: {tokens['mean']:.1f} tokens on average, {tokens['max']} at most; "
            f"{100 * found['truncated_share']:.1f} % truncated",
        ]
        if found["n_grader_killed"]:
            lines.append(f"Graded 0 because their grader had to be killed: {found['n_grader_killed']} responses")
        if not found["n_kept"]:
            return [*lines, "Nothing was kept, so there is nothing to train on."]
        estimate = found["accuracy_of_kept_estimate"]
        if estimate["value"] is not None:
            interval = "" if estimate["ci_low"] is None else f" [{estimate['ci_low']:.3f}, {estimate['ci_high']:.3f}]"
            lines.append(
                f"Accuracy of the kept: {found['accuracy_of_kept_as_sampled']:.3f} as sampled; "
                f"{estimate['value']:.3f}{interval} where one sample is counted that had no part in the choice"
            )
        return [*lines, f"Train on it: {self._next(config, found['n_kept'])}"]

    def _next(self, config: Mapping[str, Any], n_kept: int) -> str:
        words = ["mismatch-probe", "rl", "run", "--model", config["model"], "--task", config["task"]]
        words += ["--problems", str(self.problems), "--rollout-dtype", config["rollout_dtype"]]
        settings: dict[str, Any] = {"n_problems": n_kept}
        default = RlConfig()
        settings |= {n: config[n] for n in _SHARED if config[n] is not None and config[n] != getattr(default, n)}
        if n_kept < default.prompts_per_step:
            settings |= {"prompts_per_step": n_kept, "updates_per_rollout": 1}
        for name, value in settings.items():
            words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        return shlex.join(words)


def new_sanity_set(config: SanityConfig, out: str | Path | None, progress: Progress | None) -> SanityResult:
    """Makes a folder, samples and selects.

    Raises:
        ProbeError: The problems, the model, the device or the folder cannot be had, or the engine failed.
    """
    progress = progress or Progress()
    if config.problems is not None:
        read_problems(config.problems)  # a bad line is found before a model is fetched
    model, device = resolve_model(config, progress), devices.choose_device(config.device)
    path = Path(out) if out is not None else default_folder(f"sanity-set-{Path(config.model).name}")
    refuse_occupied(path)
    with locked(path):
        return _execute(SanityDirectory.create(path, config, _facts(model, device)), model, device, progress)


def _facts(model: ModelRef, device: devices.Device) -> dict[str, Any]:
    """What a folder says of model and machine."""
    return {"tool_version": version("mismatch-probe"), **provenance_of(model, device).model_dump(mode="json")}


def resume_sanity_set(path: Path, progress: Progress | None) -> SanityResult:
    """Samples what is missing; a finished set is only reported.

    Raises:
        TableError: The folder is none of a sanity set, or model or problems have changed.
    """
    progress = progress or Progress()
    SanityDirectory.open(path)  # before the lock, which would make the folder
    with locked(path):
        directory = SanityDirectory.open(path)
        found = directory.statistics()
        if found is not None:
            return SanityResult(path, found)
        model = same_model(directory.config, directory.manifest["model"]["files"], progress)
        return _execute(directory, model, devices.choose_device(directory.config.device), progress)


def _execute(directory: SanityDirectory, model: ModelRef, device: devices.Device, progress: Progress) -> SanityResult:
    environment = settings_of(directory.config, device).environment
    process = EngineProcess("vllm", environment, directory.path / "logs" / "sanity-set.log")

    def on_event(name: str, payload: Any) -> None:
        if name == "total":
            progress.total(_PASS, payload)
        elif name == "progress":
            progress.advance(_PASS, payload)
        elif name == "identity":
            directory.note_engine(payload)

    progress.begin(_PASS, "rl sanity-set")
    try:
        process.run(SanityJob(str(directory.path), str(model.path), device), on_event)
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped; finished chunks of problems are kept.",
            f"Continue with: mismatch-probe rl sanity-set --resume {directory.path}",
        ) from None
    progress.end(_PASS, "done")
    return SanityResult(directory.path, directory.finish())
