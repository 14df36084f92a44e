"""Many RL runs that differ in precision, algorithm, learning rate, injected stress and seed, from plan to report.
Imports no engine.

Each is an `rl run` in a folder of its own, `runs/NAME`, so a sweep that was stopped continues where it was. Runs of one
rollout dtype share an engine: a worker process takes one after another, by lock, so that several workers can serve one
dtype.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mismatch_probe.engines import devices
from mismatch_probe.engines.events import Event, Found, InRun, Message, RunBegins, RunEnded, StepDone, Total
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.engines.process import EngineProcess, UnexpectedEngineError
from mismatch_probe.errors import (
    EXIT_ERROR,
    EXIT_LIMIT,
    EXIT_OK,
    DiskFull,
    EngineError,
    EngineMissing,
    ProbeError,
    UsageError,
)
from mismatch_probe.files import atomic_path
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session, write_pages
from mismatch_probe.report.data import SweepData
from mismatch_probe.report.model import Report
from mismatch_probe.report.words import say
from mismatch_probe.results.sweep import Place, RlSweep, SweepSummary
from mismatch_probe.rl.plan import PlannedRun
from mismatch_probe.rl.records import SweepDirectory
from mismatch_probe.rl.run import Start, device_of
from mismatch_probe.rl.sweep_summary import runs_table, steps_table, summarise_sweep, sweep_findings
from mismatch_probe.rl.worker import RlJob, engine_settings

# A trainer that computes in real FP16 takes so many times as long on a CPU, and a run whose tokens the trainer chooses
# anywhere: what takes longest has to begin first.
_FP16_COST, _CHOOSING_COST = 4, 4
_ATTEMPTS = 2


@dataclass(frozen=True)
class Slot:
    """Where a worker runs: cores of a CPU, or a GPU's index in `CUDA_VISIBLE_DEVICES`."""

    index: int
    cores: tuple[int, ...] = ()
    gpu: str | None = None

    def environment(self) -> dict[str, str]:
        if self.gpu is not None:
            return {"CUDA_VISIBLE_DEVICES": self.gpu}
        if not self.cores:
            return {}
        return {
            "OMP_NUM_THREADS": str(len(self.cores)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores)),
        }


def slots(device: devices.Device, workers: int | None) -> list[Slot]:
    """One worker for each core that this process may use, or for each GPU.

    Args:
        device: Where they run.
        workers: How many; cores are dealt out evenly.

    Raises:
        UsageError: There are fewer cores or GPUs than workers, or no worker.
    """
    if device == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = named.split(",") if named else [str(i) for i in range(len(devices.gpu_names()))]
    else:
        found = [str(core) for core in sorted(os.sched_getaffinity(0))]
    n = len(found) if workers is None else workers
    what = "GPUs" if device == "cuda" else "cores"
    if n > len(found):
        raise UsageError(f"--workers {n} exceeds the {len(found)} available {what}.", f"Use at most {len(found)}.")
    if n < 1:
        raise UsageError(f"--workers {n} is less than 1.", "Use at least 1.")
    if device == "cuda":
        return [Slot(i, gpu=found[i]) for i in range(n)]
    return [Slot(i, cores=tuple(map(int, found[i::n]))) for i in range(n)]


class Scheduler:
    """The runs of a sweep that have not ended, worked through by one process a slot.

    Args:
        directory: With its runs; what fails is noted in it.
        model: That all runs begin from.
        device: Where.
        at: The workers' places.
        progress: Told about runs (as passes, in steps) and about the sweep as a whole.
    """

    def __init__(
        self,
        directory: SweepDirectory,
        model: ModelRef,
        device: devices.Device,
        at: Sequence[Slot],
        progress: Progress,
    ) -> None:
        self._directory, self._model, self._device, self._slots = directory, model, device, at
        self._progress = progress
        self._lock = threading.RLock()
        self._pending = [run for run in directory.runs if not directory.ended(run)]
        self._active: dict[int, PlannedRun] = {}
        self._engaged: dict[int, str] = {}
        self._attempts: Counter[str] = Counter()
        self._steps_done: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._processes: dict[int, EngineProcess] = {}
        self._stopped: BaseException | None = None

    def run(self) -> None:
        """Returns when every run has ended or has failed.

        Raises:
            KeyboardInterrupt: By the user; everything finished is kept.
            ProbeError: Nothing can go on: the disk is full, or an engine is missing.
        """
        total = sum(run.config.steps for run in self._directory.runs)
        self._progress.begin("sweep", "sweep")
        self._progress.total("sweep", total)
        self._progress.advance("sweep", total - sum(run.config.steps for run in self._pending))
        threads = [threading.Thread(target=self._work, args=(slot,), daemon=True) for slot in self._slots]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.2)
        except KeyboardInterrupt as stopped:
            self._stop(stopped)
            for thread in threads:
                thread.join()
        if self._stopped is not None:
            raise self._stopped from None
        self._progress.end("sweep", f"{len(self._directory.runs) - len(self._pending)} runs have ended")

    def _stop(self, why: BaseException) -> None:
        with self._lock:
            self._stopped = self._stopped or why
            processes = list(self._processes.values())
        for process in processes:
            process.close()

    def _work(self, slot: Slot) -> None:
        """A slot's thread: one engine process after another, until nothing is left that no other has."""
        try:
            while runs := self._next(slot):
                self._serve(slot, runs)
        except BaseException as error:
            self._stop(error)

    def _next(self, slot: Slot) -> list[PlannedRun]:
        """The runs of the engine that a slot starts next: one that no other slot has, and with most to do."""
        with self._lock:
            self._engaged.pop(slot.index, None)
            groups: dict[str, list[PlannedRun]] = {}
            for run in self._free(self._pending):
                groups.setdefault(_engine_of(run), []).append(run)
            if not groups or self._stopped is not None:
                return []
            engaged = set(self._engaged.values())
            costs = {key: sum(_cost(run, self._device) for run in runs) for key, runs in groups.items()}
            best = max(groups, key=lambda key: (key not in engaged, costs[key]))
            self._engaged[slot.index] = best
            return sorted(groups[best], key=lambda run: (run.config.seed, -_cost(run, self._device)))

    def _free(self, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
        """Those that no slot has, and that have neither failed nor ended, by whichever process."""
        taken = {run.name for run in self._active.values()} | self._failed
        found = []
        for run in list(runs):
            if run not in self._pending or run.name in taken:
                continue
            if self._directory.ended(run):
                self._finish(run, "ended elsewhere")
            else:
                found.append(run)
        return found

    def _serve(self, slot: Slot, runs: Sequence[PlannedRun]) -> None:
        with self._lock:  # two slots that share an engine's runs make the same folders
            folders = [str(self._directory.folder_of(run).path) for run in runs]
        by_folder = dict(zip(folders, runs, strict=True))
        job = RlJob(folders, str(self._model.path), self._device, slot.cores, shared=True)
        environment = engine_settings(runs[0].config, self._device).environment | slot.environment()
        process = EngineProcess(
            runs[0].config.rollout_engine, environment, self._directory.path / "logs" / f"worker-{slot.index}.log"
        )
        with self._lock:
            self._processes[slot.index] = process
            if self._stopped is not None:  # what stopped the others has not seen this one
                process.close()
                return
        begun: list[str] = []
        try:
            process.run(job, lambda event: self._on_event(slot, by_folder, begun, event))
            if not begun and (held := self._free(runs)):
                what = f"Another process is using {held[0].name}."
                self._fail(held, ProbeError(what, "Wait until it ends, then continue with --resume."))
        except ProbeError as error:
            if self._stopped is None:
                self._judge(slot, runs, error)
        finally:
            with self._lock:
                self._active.pop(slot.index, None)
                self._processes.pop(slot.index, None)

    def _on_event(self, slot: Slot, runs: Mapping[str, PlannedRun], begun: list[str], event: Event) -> None:
        if not isinstance(event, InRun):
            return
        run = runs[event.folder]
        match event.event:
            case RunBegins():
                begun.append(run.name)
                with self._lock:
                    self._active[slot.index] = run
                    self._failed.discard(run.name)
                    self._directory.note_failure(run, None)
                self._progress.begin(run.name, run.name)
            case Total(amount):
                self._progress.total(run.name, amount)
                self._advance(run, run.config.steps - amount)
            case StepDone(row):
                self._progress.advance(run.name, 1)
                self._advance(run, row["step"] + 1)
            case Found(finding):
                self._progress.message(f"{run.name}: {say(finding)}")
            case Message(text):
                self._progress.message(f"{run.name}: {text}")
            case RunEnded(ending):
                with self._lock:
                    self._active.pop(slot.index, None)
                    self._finish(run, f"{ending.status} after {ending.steps} steps")

    def _finish(self, run: PlannedRun, said: str) -> None:
        self._pending.remove(run)
        self._advance(run, run.config.steps)
        self._progress.end(run.name, said)

    def _advance(self, run: PlannedRun, done: int) -> None:
        """A second attempt counts from where it begins, and a run that ended early as whole."""
        with self._lock:
            more, self._steps_done[run.name] = done - self._steps_done[run.name], done
        self._progress.advance("sweep", more)

    def _judge(self, slot: Slot, runs: Sequence[PlannedRun], error: ProbeError) -> None:
        """One run's failure, or, where none was at work, that of the engine; each gets a second try if it is not
        certain to fail again. Some failures are the end of everything.
        """
        if isinstance(error, DiskFull | EngineMissing):
            raise error
        with self._lock:
            run = self._active.pop(slot.index, None)
            key = run.name if run is not None else f"engine {_engine_of(runs[0])}"
            self._attempts[key] += 1
            again = isinstance(error, UnexpectedEngineError) or type(error) is EngineError
            if again and self._attempts[key] < _ATTEMPTS:
                self._progress.end(key, f"{error.what} Once more.")
            else:
                self._fail([run] if run is not None else self._free(runs), error)

    def _fail(self, runs: Sequence[PlannedRun], error: ProbeError) -> None:
        for run in runs:
            with self._lock:
                self._failed.add(run.name)
                self._directory.note_failure(run, error)
            self._progress.end(run.name, error.what)


def _engine_of(run: PlannedRun) -> str:
    """Runs of equal value can share an engine."""
    return run.config.rollout_dtype


def _cost(run: PlannedRun, device: str) -> int:
    """About how long a run takes, in steps of a plain one."""
    slow = _FP16_COST if device == "cpu" and run.config.trainer_dtype == "float16" else 1
    return run.config.steps * max(slow, _CHOOSING_COST if run.config.remedy == "zero-mismatch" else 1)


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
    at = slots(device_of(first), workers)
    start = Start.of([run.config for run in runs], progress, out, _sharing(at))
    with Session.new(
        lambda path: SweepDirectory.create(path, runs, start.provenance()),
        f"rl-{kind}-{Path(first.model).name}",
        out,
        progress,
    ) as session:
        return _execute(session, start, at)


def _sharing(at: Sequence[Slot]) -> int:
    """Workers that share the memory of a device: those on a CPU; a GPU has one."""
    return sum(slot.gpu is None for slot in at) or 1


def resume_sweep(path: Path, workers: int | None, progress: Progress | None) -> SweepResult:
    """Trains the runs that have not ended.

    Raises:
        TableError: The folder is none of a sweep, or the model has changed.
    """
    with Session.resume(SweepDirectory, path, progress) as session:
        if session.complete:
            return write_sweep(session.run)
        configs = [run.config for run in session.run.runs]
        at = slots(device_of(configs[0]), workers)
        return _execute(session, Start.again(session.run, configs, session.progress, _sharing(at)), at)


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
