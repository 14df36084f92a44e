"""A sweep from plan to report. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mismatch_probe.engines import devices
from mismatch_probe.errors import EXIT_ERROR, EXIT_LIMIT, EXIT_OK
from mismatch_probe.files import atomic_path
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.data import SweepData
from mismatch_probe.report.model import Report
from mismatch_probe.results.sweep import Place, RlSweep, SweepSummary
from mismatch_probe.rl.plan import PlannedRun
from mismatch_probe.rl.run import provenance_of, resolve_model, same_model
from mismatch_probe.rl.sweep import Scheduler, SweepDirectory, slots
from mismatch_probe.rl.sweep_summary import runs_table, steps_table, summarise_sweep, sweep_findings
from mismatch_probe.runs.folder import new_folder


@dataclass(frozen=True)
class SweepResult:
    """A sweep, as far as it has gone.

    Attributes:
        path: Its folder.
        data: What its report shows.
        figures: Figure files by name.
    """

    path: Path
    data: SweepData
    figures: dict[str, Path]

    @property
    def document(self) -> RlSweep:
        """The content of `sweep.json`."""
        return self.data.sweep

    @property
    def summary(self) -> SweepSummary:
        """Arms, comparisons and dose response."""
        return self.data.summary

    @property
    def exit_code(self) -> int:
        """An error where runs failed; the limit's code where a run without injected stress collapsed or diverged,
        since stress is there to make runs collapse.
        """
        if self.summary.failures:
            return EXIT_ERROR
        lost = any(arm.structure == "none" and arm.n_lost for arm in self.summary.arms)
        return EXIT_LIMIT if lost else EXIT_OK

    def runs(self) -> pd.DataFrame:
        """A row per run, see `rl.sweep_summary.runs_table`."""
        return self.data.runs

    def report(self) -> Report:
        """The report."""
        from mismatch_probe.report.sweep import sweep_report

        return sweep_report(self.data)


def new_sweep(
    runs: Sequence[PlannedRun],
    out: str | Path | None,
    workers: int | None,
    progress: Progress | None,
    kind: str = "sweep",
) -> SweepResult:
    """Makes a folder and trains all runs.

    Raises:
        ProbeError: The model, the device or the folder cannot be had; nothing finished is lost.
    """
    progress = progress or Progress()
    first = runs[0].config
    model, device = resolve_model(first, progress), devices.choose_device(first.device)
    at = slots(device, workers)
    with new_folder(out, f"rl-{kind}-{Path(first.model).name}") as path:
        directory = SweepDirectory.create(path, runs, provenance_of(model, device))
        Scheduler(directory, model, device, at, progress).run()
        return write_sweep(directory)


def resume_sweep(path: Path, workers: int | None, progress: Progress | None) -> SweepResult:
    """Trains the runs that have not ended.

    Raises:
        TableError: The folder is none of a sweep, or the model has changed.
    """
    progress = progress or Progress()
    with SweepDirectory.reopened(path) as directory:
        first = directory.runs[0].config
        model = same_model(first, directory.document.provenance.model.files, progress)
        device = devices.choose_device(first.device)
        Scheduler(directory, model, device, slots(device, workers), progress).run()
        return write_sweep(directory)


def write_sweep(directory: SweepDirectory, places: Sequence[Place] = ()) -> SweepResult:
    """Tables, statistics, figures and report of a sweep, from what its runs have written."""
    from mismatch_probe.report.figures import draw
    from mismatch_probe.report.render import write_report
    from mismatch_probe.report.sweep import sweep_report

    runs, steps = runs_table(directory), steps_table(directory)
    for name, table in (("runs", runs), ("steps", steps)):
        with atomic_path(directory.path / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
    summary = summarise_sweep(directory.runs, runs, places)
    directory.write(directory.document.model_copy(update={"summary": summary, "findings": sweep_findings(summary)}))
    config = directory.runs[0].config
    data = SweepData(
        folder=str(directory.path),
        model=Path(config.model).name,
        sweep=directory.document,
        summary=summary,
        task=config.task,
        runs=runs,
        steps=steps,
    )
    figures = draw(data, directory.path / "figures")
    write_report(sweep_report(data), figures, directory.path)
    return SweepResult(directory.path, data, figures)
