"""One run from beginning to end: folder, passes, analysis, outputs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch_probe.config import CompareConfig, Limit
from mismatch_probe.engines import devices
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.analysis import analyse, draw_figures, summary_frame, write_outputs
from mismatch_probe.probes.compare import Comparison
from mismatch_probe.probes.planning import Plan, make_plan, trainer_passes
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.data import ReportData
from mismatch_probe.tables import RunDirectory


@dataclass(frozen=True)
class RunResult:
    """A compared run.

    Attributes:
        path: The run directory.
        data: Everything that its report shows; `data.summary` is the content of `summary.json`.
        figures: Figure files by name.
    """

    path: Path
    data: ReportData
    figures: dict[str, Path]

    @property
    def summary(self) -> dict[str, Any]:
        return self.data.summary

    def frame(self) -> pd.DataFrame:
        """A row per pair and metric, as in `summary.csv`."""
        return summary_frame(self.summary)

    @property
    def exceeded(self) -> bool:
        """Whether a limit of `fail_on` is exceeded or cannot be judged."""
        return any(row["exceeded"] for row in self.summary["limits"])

    @property
    def complete(self) -> bool:
        """Whether every pass that can run here has run."""
        return bool(self.data.manifest["status"] == "complete")


def parse_limits(texts: Sequence[str], config: CompareConfig) -> list[Limit]:
    """Reads `--fail-on`.

    Raises:
        UsageError: A limit is malformed, or applies to no pair of this comparison.
    """
    limits = [Limit.parse(text, list(CATALOG)) for text in texts]
    for limit in limits:
        pairs = [(r, t.dtype) for r in config.rollout_dtypes for t in trainer_passes(config)]
        if not any(limit.applies_to(rollout, trainer) for rollout, trainer in pairs):
            raise UsageError(f"--fail-on {limit.text!r} applies to no pair of this comparison.", "Check its dtypes.")
    return limits


def new_run(
    config: CompareConfig, out: str | Path | None, fail_on: Sequence[str], progress: Progress | None
) -> RunResult:
    limits = parse_limits(fail_on, config)
    progress = progress or Progress()
    plan = make_plan(config, progress)
    path = Path(out) if out is not None else default_folder(config.model)
    run = RunDirectory.create(path, _manifest(plan))
    return _finish(plan, run, limits, progress)


def resume_run(path: Path, fail_on: Sequence[str], progress: Progress | None) -> RunResult:
    run = RunDirectory.open(path)
    config = CompareConfig.from_dict(run.manifest["config"])
    limits = parse_limits(fail_on, config)
    progress = progress or Progress()
    # Sizes that were left to the machine's default stay what they were, on whatever machine the run continues.
    plan = make_plan(replace(config, **run.manifest["sizes"]), progress)
    known = run.manifest["prompts"]["sha256"]
    if plan.prompts.sha256 != known:
        raise TableError(
            "The prompts have changed since this run began.", "Restore the prompt file, or start a new run."
        )
    if plan.device != run.manifest["device"]:
        raise UsageError(
            f"This run began on {run.manifest['device']}, and this machine offers {plan.device}.",
            "Continue it where it began; `report` works anywhere.",
        )
    # A pass that failed gets another try; one that an engine refuses would only be refused again.
    run.manifest["passes"] = {k: v for k, v in run.manifest["passes"].items() if v["status"] != "failed"}
    return _finish(plan, run, limits, progress)


def report_run(path: Path, fail_on: Sequence[str]) -> RunResult:
    run = RunDirectory.open(path)
    limits = parse_limits(fail_on, CompareConfig.from_dict(run.manifest["config"]))
    data = analyse(run, limits)
    return RunResult(path, data, write_outputs(run, data))


def plot_run(path: Path) -> dict[str, Path]:
    run = RunDirectory.open(path)
    return draw_figures(run, analyse(run))


def default_folder(model: str) -> Path:
    """`runs/<model>-<local time>`."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-") or "model"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _finish(plan: Plan, run: RunDirectory, limits: list[Limit], progress: Progress) -> RunResult:
    with run.locked():
        hashes, model = _Hashes(plan), run.manifest["model"]
        if "files" in model and model["files"] != hashes.result():
            raise TableError("The model's files have changed since this run began.", "Start a new run.")
        try:
            Comparison(plan, run, progress).execute()
        finally:
            if run.finished_passes():  # no pass of another model may ever join these
                model["files"] = hashes.result()
                run.save()
        progress.message("computing metrics and figures")
        data = analyse(run, limits)
        return RunResult(run.path, data, write_outputs(run, data))


class _Hashes:
    """SHA-256 of the model's files, computed while the engines are busy."""

    def __init__(self, plan: Plan) -> None:
        self._files: dict[str, str] = {}
        self._thread = threading.Thread(target=lambda: self._files.update(plan.model.file_hashes()), daemon=True)
        self._thread.start()

    def result(self) -> dict[str, str]:
        self._thread.join()
        return self._files


def _manifest(plan: Plan) -> dict[str, Any]:
    return {
        "tool_version": version("mismatch-probe"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": plan.config.as_dict(),
        "sizes": vars(plan.sizes),
        "device": plan.device,
        "model": {"name": plan.config.model, "revision": plan.model.revision, "path": str(plan.model.path)},
        "prompts": {"source": plan.prompts.source, "n": len(plan.prompts.prompts), "sha256": plan.prompts.sha256},
        "environment": {
            "versions": devices.package_versions(),
            "machine": devices.machine(),
            "variables": devices.recorded_environment(),
        },
    }
