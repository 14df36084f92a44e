"""A sweep from plan to report. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mismatch_probe.errors import EXIT_ERROR, EXIT_LIMIT, EXIT_OK
from mismatch_probe.files import atomic_path
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session, write_pages
from mismatch_probe.report.data import SweepData
from mismatch_probe.report.model import Report
from mismatch_probe.results.sweep import Place, RlSweep, SweepSummary
from mismatch_probe.rl.plan import PlannedRun
from mismatch_probe.rl.run import Start
from mismatch_probe.rl.sweep import Scheduler, Slot, SweepDirectory, slots
from mismatch_probe.rl.sweep_summary import runs_table, steps_table, summarise_sweep, sweep_findings


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
    start = Start.of(first, progress, out, [run.config for run in runs[1:]])
    at = slots(start.device, workers)
    with Session.new(
        lambda path: SweepDirectory.create(path, runs, start.provenance()),
        f"rl-{kind}-{Path(first.model).name}",
        out,
        progress,
    ) as session:
        return _execute(session, start, at)


def resume_sweep(path: Path, workers: int | None, progress: Progress | None) -> SweepResult:
    """Trains the runs that have not ended.

    Raises:
        TableError: The folder is none of a sweep, or the model has changed.
    """
    with Session.resume(SweepDirectory, path, progress) as session:
        if session.complete:
            return write_sweep(session.run)
        start = Start.again(session.run, session.run.runs[0].config, session.progress)
        return _execute(session, start, slots(start.device, workers))


def _execute(session: Session[SweepDirectory], start: Start, at: Sequence[Slot]) -> SweepResult:
    with session.stoppable("finished runs are kept, and the others up to their last checkpoint"):
        Scheduler(session.run, start.model, start.device, at, session.progress).run()
    return write_sweep(session.run)


def write_sweep(directory: SweepDirectory, places: Sequence[Place] = ()) -> SweepResult:
    """Tables, statistics, figures and report of a sweep, from what its runs have written."""
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
    return SweepResult(directory.path, data, write_pages(data, sweep_report, directory.path))
