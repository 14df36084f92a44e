"""The folders of an RL run, what is appended while it goes on and the tables that it ends as, and of a sweep of runs.

run.json            the run's document: settings, provenance, and at the end how it ended and what it shows
steps.jsonl         a line per finished step, as it ends
rollouts/           a Parquet file per step, in the format of `compare --from`
checkpoints/        see `rl.policy`
failure/            the batch of a step that failed, for replay
steps.parquet, rollouts.parquet     the same at the end, as tables
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mismatch_probe.errors import ProbeError, TableError
from mismatch_probe.files import atomic_path, write_json, write_text, writing
from mismatch_probe.results.base import Document
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.rl_run import Ending, FailedRun, Provenance, RlRun
from mismatch_probe.results.sanity import SanitySet
from mismatch_probe.results.sweep import RlSweep, SweepRun
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.plan import PlannedRun, planned_runs
from mismatch_probe.rl.summary import run_findings, summarise
from mismatch_probe.runs.folder import RL_RUN, SWEEP, Kind, RunFolder

RlDocument = TypeVar("RlDocument", RlRun, RlSweep, SanitySet)


class RlFolder(RunFolder[RlDocument]):
    """The folder of an RL run, a sweep or a sanity set, whose document tells its provenance."""

    @property
    def model_files(self) -> Mapping[str, str]:
        return self.document.provenance.model.files

    @property
    def device(self) -> str:
        return self.document.provenance.device


class RlDirectory(RlFolder[RlRun]):
    """The folder of an RL run."""

    KIND: ClassVar[Kind] = RL_RUN
    DOCUMENT: ClassVar[type[Document]] = RlRun

    def __init__(self, path: Path, document: RlRun) -> None:
        super().__init__(path, document)
        self.config = RlConfig.of(document.config)

    @classmethod
    def create(cls, path: Path, config: RlConfig, provenance: Provenance) -> RlDirectory:
        """Makes a new run folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        return cls._create(path, RlRun(**RlRun.stamp(), config=config.model_dump(), provenance=provenance))

    @property
    def complete(self) -> bool:
        return self.document.ending is not None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def ending(self) -> Ending | None:
        """How the run ended, whichever process wrote it; None while it has not."""
        return RlDirectory.open(self.path).document.ending

    def finish(self, ending: Ending) -> None:
        """Writes the tables and then the document, which says that there is nothing left to do."""
        steps = self.steps()
        with atomic_path(self.path / "steps.parquet") as temporary:
            steps.to_parquet(temporary, index=False)
        parts = sorted((self.path / "rollouts").glob("step-*.parquet"))
        if parts:
            # Part by part: all rollouts of a long run need not fit into memory.
            schema = pq.read_schema(parts[0])
            with (
                atomic_path(self.path / "rollouts.parquet") as temporary,
                pq.ParquetWriter(temporary, schema) as writer,
            ):
                for part in parts:
                    writer.write_table(pq.read_table(part))
        self.document = self.document.model_copy(update={"ending": ending})
        self.summarise(steps)

    def summarise(self, steps: pd.DataFrame) -> RlRun:
        """Computes what the steps show, and writes it into the document, which it returns."""
        summary = summarise(steps, self.config)
        findings = run_findings(self.config, self.document.ending, summary)
        self.write(self.document.model_copy(update={"summary": summary, "findings": findings}))
        return self.document

    def steps(self) -> pd.DataFrame:
        """A row per finished step.

        Raises:
            TableError: The file is damaged.
        """
        return pd.DataFrame([row for _, row in self._step_lines()])

    def _step_lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines of `steps.jsonl` as they stand, each with its row."""
        path = self.path / "steps.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            # A process that was killed while it wrote leaves half a line, of a step that will be done again.
            return [(line, json.loads(line)) for line in lines if line.endswith("}")]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise TableError(f"{path} cannot be read ({error}).", "Restore the file, or start a new run.") from None

    def append_step(self, row: Mapping[str, Any]) -> None:
        """Adds a step's line.

        Raises:
            DiskFull: No space is left on the device.
            TableError: Another I/O failure.
        """
        text = json.dumps(row, allow_nan=False) + "\n"
        with writing(self.path / "steps.jsonl") as path, path.open("a", encoding="utf-8") as handle:
            handle.write(text)

    def append_rollout(self, step: int, table: pa.Table) -> None:
        with atomic_path(self.path / "rollouts" / f"step-{step:06d}.parquet") as temporary:
            pq.write_table(table, temporary)

    def save_failure(self, table: pa.Table, cause: Finding) -> None:
        """Keeps the batch of a step that failed, and why it failed."""
        folder = self.path / "failure"
        with atomic_path(folder / "batch.parquet") as temporary:
            pq.write_table(table, temporary)
        write_json(folder / "failure.json", cause.model_dump())

    def rewind(self, step: int) -> None:
        """Forgets what came after a checkpoint: step `step` is the next one."""
        if (self.path / "steps.jsonl").exists():
            kept = [line for line, row in self._step_lines() if row["step"] < step]
            write_text(self.path / "steps.jsonl", "".join(f"{line}\n" for line in kept))
        for part in (self.path / "rollouts").glob("step-*.parquet"):
            if step_of(part) >= step:
                part.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def step_of(path: Path) -> int:
    """The step that a checkpoint, or the file of a step's rollouts, is named after."""
    return int(path.stem.removeprefix("step-"))


class SweepDirectory(RlFolder[RlSweep]):
    """The folder of a sweep.

    sweep.json          the sweep's document: planned runs, provenance, and what the runs show
    runs/NAME           a run's folder each, see `rl.records`
    logs/               a worker's each

    Attributes:
        runs: The planned runs.
    """

    KIND: ClassVar[Kind] = SWEEP
    DOCUMENT: ClassVar[type[Document]] = RlSweep

    def __init__(self, path: Path, document: RlSweep) -> None:
        super().__init__(path, document)
        self.runs = planned_runs(document, path / self.KIND.file)

    @classmethod
    def create(cls, path: Path, runs: Sequence[PlannedRun], provenance: Provenance) -> SweepDirectory:
        """Makes a new folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        planned = tuple(SweepRun(name=run.name, arm=run.arm, config=run.config.model_dump()) for run in runs)
        return cls._create(path, RlSweep(**RlSweep.stamp(), runs=planned, provenance=provenance))

    @property
    def complete(self) -> bool:
        return all(self.ended(run) for run in self.runs)

    def existing(self, run: PlannedRun) -> RlDirectory | None:
        """The run's folder; None where it has not begun."""
        path = self.path / "runs" / run.name
        return RlDirectory.open(path) if RL_RUN.held_by(path) else None

    def folder_of(self, run: PlannedRun) -> RlDirectory:
        """The run's folder, made where it is missing."""
        path = self.path / "runs" / run.name
        return self.existing(run) or RlDirectory.create(path, run.config, self.document.provenance)

    def ended(self, run: PlannedRun) -> bool:
        folder = self.existing(run)
        return folder is not None and folder.document.ending is not None

    def failure(self, run: PlannedRun) -> str:
        """Why the run's last attempt failed; empty where it did not."""
        path = self._failure_path(run)
        return FailedRun.read(path).why if path.exists() else ""

    def note_failure(self, run: PlannedRun, error: ProbeError | None) -> None:
        """Keeps why a run failed, or forgets it."""
        if error is not None:
            FailedRun(**FailedRun.stamp(), why=str(error)).write(self._failure_path(run))
        else:
            self._failure_path(run).unlink(missing_ok=True)

    def _failure_path(self, run: PlannedRun) -> Path:
        return self.path / "runs" / run.name / "failed.json"
