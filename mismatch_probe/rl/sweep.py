"""Many RL runs that differ in precision, algorithm, learning rate, injected stress and seed. Imports no engine.

Each cell is an `rl run` of its own in `cells/NAME`, with checkpoints and result, so a sweep that was stopped goes on
where it was. Cells of one rollout dtype share an engine: a worker process takes one after another, by lock, so that
several workers can serve one dtype.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.engines import devices
from mismatch_probe.engines.models import ModelRef
from mismatch_probe.engines.process import EngineProcess, UnexpectedEngineError
from mismatch_probe.errors import DiskFull, EngineError, EngineMissing, Interrupted, ProbeError, TableError, UsageError
from mismatch_probe.files import write_json
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.words import say
from mismatch_probe.results.rl_run import Provenance
from mismatch_probe.rl.config import make_config
from mismatch_probe.rl.plan import Cell, named_cell
from mismatch_probe.rl.records import RlDirectory, is_run
from mismatch_probe.rl.run import worker_environment
from mismatch_probe.rl.worker import RlJob
from mismatch_probe.tables import SCHEMA_VERSION, read_json, refuse_occupied

_FILE = "sweep.json"
# A trainer that computes in real FP16 takes so many times as long on a CPU: what takes longest has to begin first.
_FP16_COST = 4
_ATTEMPTS = 2


class SweepDirectory:
    """A sweep's folder.

    sweep.json          cells with their configurations, the model's files, versions and machine
    cells/NAME          a run's folder each, see `rl.records`
    logs/               a worker's each
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], cells: Sequence[Cell]) -> None:
        self.path, self.manifest, self.cells = path, manifest, list(cells)

    @classmethod
    def create(cls, path: Path, cells: Sequence[Cell], facts: Mapping[str, Any]) -> SweepDirectory:
        """Makes a new folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        refuse_occupied(path)
        rows = [{"name": cell.name, "arm": cell.arm, "config": cell.config.as_dict()} for cell in cells]
        manifest = {"schema_version": SCHEMA_VERSION, "kind": "rl-sweep", "cells": rows, **facts}
        write_json(path / _FILE, manifest)
        return cls(path, manifest, cells)

    @classmethod
    def open(cls, path: Path) -> SweepDirectory:
        """Opens an existing folder.

        Raises:
            TableError: It is none.
        """
        manifest = read_json(path / _FILE) if is_sweep(path) else {}
        if manifest.get("kind") != "rl-sweep":
            raise TableError(
                f"{path} is no folder of a sweep.", "Give the folder that `mismatch-probe rl sweep` wrote."
            )
        # Names become paths, so they are made again and not read.
        cells = [named_cell(make_config(row["config"])) for row in manifest.get("cells", ())]
        if not cells or [cell.name for cell in cells] != [row.get("name") for row in manifest["cells"]]:
            raise TableError(f"{path / _FILE} is damaged: its cells are not what they are called.", "Restore the file.")
        return cls(path, manifest, cells)

    def existing(self, cell: Cell) -> RlDirectory | None:
        """The cell's run folder; None where it has not begun."""
        path = self.path / "cells" / cell.name
        return RlDirectory.open(path) if is_run(path) else None

    def run_of(self, cell: Cell) -> RlDirectory:
        """The cell's run folder, made where it is missing."""
        facts = {name: self.manifest[name] for name in ("created", "device", "model", "environment")}
        path = self.path / "cells" / cell.name
        return self.existing(cell) or RlDirectory.create(path, cell.config, Provenance(**facts))

    def ended(self, cell: Cell) -> bool:
        run = self.existing(cell)
        return run is not None and run.document.ending is not None

    def failure(self, cell: Cell) -> str:
        """Why the cell's last attempt failed; empty where it did not."""
        path = self._failure_path(cell)
        return str(read_json(path)["why"]) if path.exists() else ""

    def note_failure(self, cell: Cell, error: ProbeError | None) -> None:
        """Keeps why a cell failed, or forgets it."""
        if error is not None:
            write_json(self._failure_path(cell), {"schema_version": SCHEMA_VERSION, "why": str(error)})
        else:
            self._failure_path(cell).unlink(missing_ok=True)

    def _failure_path(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.name / "failed.json"


def is_sweep(path: Path) -> bool:
    """Whether the folder looks like a sweep's."""
    return (path / _FILE).exists()


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
        UsageError: There is not so much to deal out.
    """
    if device == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = named.split(",") if named else [str(i) for i in range(len(devices.gpu_names()))]
    else:
        found = [str(core) for core in sorted(os.sched_getaffinity(0))]
    n = len(found) if workers is None else workers
    if not 1 <= n <= len(found):
        what = "GPUs" if device == "cuda" else "cores"
        raise UsageError(f"--workers {n} cannot be: there are {len(found)} {what}.", "Give every worker one or more.")
    if device == "cuda":
        return [Slot(i, gpu=found[i]) for i in range(n)]
    return [Slot(i, cores=tuple(map(int, found[i::n]))) for i in range(n)]


class Sweep:
    """The cells of a sweep that have not ended, worked through by one process a slot.

    Args:
        directory: With its cells; what fails is noted in it.
        model: That all runs begin from.
        device: Where.
        at: The workers' places.
        progress: Told about cells (as passes, in steps) and about the sweep as a whole.
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
        self._pending = [cell for cell in directory.cells if not directory.ended(cell)]
        self._active: dict[int, Cell] = {}
        self._engaged: dict[int, str] = {}
        self._attempts: Counter[str] = Counter()
        self._steps_done: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._processes: dict[int, EngineProcess] = {}
        self._stopped: BaseException | None = None

    def run(self) -> None:
        """Returns when every cell has ended or has failed.

        Raises:
            Interrupted: By the user; everything finished is kept.
            ProbeError: Nothing can go on: the disk is full, or an engine is missing.
        """
        total = sum(cell.config.steps for cell in self._directory.cells)
        self._progress.begin("sweep", "sweep")
        self._progress.total("sweep", total)
        self._progress.advance("sweep", total - sum(cell.config.steps for cell in self._pending))
        threads = [threading.Thread(target=self._work, args=(slot,), daemon=True) for slot in self._slots]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.2)
        except KeyboardInterrupt:
            self._stop(
                Interrupted(
                    "Stopped; finished cells are kept, and the others up to their last checkpoint.",
                    f"Continue with: mismatch-probe rl sweep --resume {self._directory.path}",
                )
            )
            for thread in threads:
                thread.join()
        if self._stopped is not None:
            raise self._stopped from None
        self._progress.end("sweep", f"{len(self._directory.cells) - len(self._pending)} cells have ended")

    def _stop(self, why: BaseException) -> None:
        with self._lock:
            self._stopped = self._stopped or why
            processes = list(self._processes.values())
        for process in processes:
            process.close()

    def _work(self, slot: Slot) -> None:
        """A slot's thread: one engine process after another, until nothing is left that no other has."""
        try:
            while cells := self._next(slot):
                self._serve(slot, cells)
        except BaseException as error:
            self._stop(error)

    def _next(self, slot: Slot) -> list[Cell]:
        """The cells of the engine that a slot starts next: one that no other slot has, and with most to do."""
        with self._lock:
            self._engaged.pop(slot.index, None)
            groups: dict[str, list[Cell]] = {}
            for cell in self._free(self._pending):
                groups.setdefault(_engine_of(cell), []).append(cell)
            if not groups or self._stopped is not None:
                return []
            engaged = set(self._engaged.values())
            best = max(groups, key=lambda key: (key not in engaged, _cost(groups[key], self._device)))
            self._engaged[slot.index] = best
            return groups[best]

    def _free(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that no slot has, and that have neither failed nor ended, by whichever process."""
        taken = {cell.name for cell in self._active.values()} | self._failed
        found = []
        for cell in list(cells):
            if cell not in self._pending or cell.name in taken:
                continue
            if self._directory.ended(cell):
                self._finish(cell, "ended elsewhere")
            else:
                found.append(cell)
        return found

    def _serve(self, slot: Slot, cells: Sequence[Cell]) -> None:
        with self._lock:  # two slots that share an engine's cells make the same folders
            folders = [str(self._directory.run_of(cell).path) for cell in cells]
        by_folder = dict(zip(folders, cells, strict=True))
        job = RlJob(folders, str(self._model.path), self._device, slot.cores, shared=True)
        environment = worker_environment(cells[0].config, self._device) | slot.environment()
        process = EngineProcess("vllm", environment, self._directory.path / "logs" / f"worker-{slot.index}.log")
        with self._lock:
            self._processes[slot.index] = process
            if self._stopped is not None:  # what stopped the others has not seen this one
                process.close()
                return
        begun: list[str] = []
        try:
            process.run(job, lambda name, payload: self._on_event(slot, by_folder, begun, name, payload))
            if not begun and (held := self._free(cells)):
                what = f"Another process is using {held[0].name}."
                self._fail(held, ProbeError(what, "Wait until it ends, then continue with --resume."))
        except ProbeError as error:
            if self._stopped is None:
                self._judge(slot, cells, error)
        finally:
            with self._lock:
                self._active.pop(slot.index, None)
                self._processes.pop(slot.index, None)

    def _on_event(self, slot: Slot, cells: Mapping[str, Cell], begun: list[str], name: str, payload: Any) -> None:
        if name not in ("run", "total", "step", "finding", "message", "ending"):
            return
        cell = cells[payload[0]]
        if name == "run":
            begun.append(cell.name)
            with self._lock:
                self._active[slot.index] = cell
                self._failed.discard(cell.name)
                self._directory.note_failure(cell, None)
            self._progress.begin(cell.name, cell.name)
        elif name == "total":
            self._progress.total(cell.name, payload[1])
            self._advance(cell, cell.config.steps - payload[1])
        elif name == "step":
            self._progress.advance(cell.name, 1)
            self._advance(cell, payload[1]["step"] + 1)
        elif name == "finding":
            self._progress.message(f"{cell.name}: {say(payload[1])}")
        elif name == "message":
            self._progress.message(f"{cell.name}: {payload[1]}")
        else:
            with self._lock:
                self._active.pop(slot.index, None)
                self._finish(cell, f"{payload[1].status} after {payload[1].steps} steps")

    def _finish(self, cell: Cell, said: str) -> None:
        self._pending.remove(cell)
        self._advance(cell, cell.config.steps)
        self._progress.end(cell.name, said)

    def _advance(self, cell: Cell, done: int) -> None:
        """A second attempt counts from where it begins, and a run that ended early as whole."""
        with self._lock:
            more, self._steps_done[cell.name] = done - self._steps_done[cell.name], done
        self._progress.advance("sweep", more)

    def _judge(self, slot: Slot, cells: Sequence[Cell], error: ProbeError) -> None:
        """One cell's failure, or, where none was at work, that of the engine; each gets a second try if it is not
        certain to fail again. Some failures are the end of everything.
        """
        if isinstance(error, DiskFull | EngineMissing):
            raise error
        with self._lock:
            cell = self._active.pop(slot.index, None)
            key = cell.name if cell is not None else f"engine {_engine_of(cells[0])}"
            self._attempts[key] += 1
            again = isinstance(error, UnexpectedEngineError) or type(error) is EngineError
            if again and self._attempts[key] < _ATTEMPTS:
                self._progress.end(key, f"{error.what} Once more.")
            else:
                self._fail([cell] if cell is not None else self._free(cells), error)

    def _fail(self, cells: Sequence[Cell], error: ProbeError) -> None:
        for cell in cells:
            with self._lock:
                self._failed.add(cell.name)
                self._directory.note_failure(cell, error)
            self._progress.end(cell.name, error.what)


def _engine_of(cell: Cell) -> str:
    """Cells of equal value can share an engine."""
    return cell.config.rollout_dtype


def _cost(cells: Sequence[Cell], device: str) -> float:
    slow = _FP16_COST if device == "cpu" else 1
    return sum(c.config.steps * (slow if c.config.trainer_dtype == "float16" else 1) for c in cells)
