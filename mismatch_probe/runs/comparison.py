"""The folder of a comparison: which passes it has, its tables and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from mismatch_probe.config import CompareConfig
from mismatch_probe.passes import RECORDED_ROLLOUT, RECORDED_TRAINER, PassId
from mismatch_probe.results.base import Document
from mismatch_probe.results.manifest import Manifest, PassRecord, Recorded
from mismatch_probe.runs.folder import COMPARISON, Kind, RunFolder
from mismatch_probe.tables import PassTables


@dataclass(frozen=True)
class Passes:
    """The passes of a comparison.

    Attributes:
        rollouts: Rows of the matrix, in the order in which they run.
        trainers: Columns.
        reference: What the error budget charges errors against, None where there is none.
        source: The pass whose sequences every other pass takes; None where each rollout samples its own.
    """

    rollouts: tuple[PassId, ...]
    trainers: tuple[PassId, ...]
    reference: PassId | None
    source: PassId | None

    @property
    def scored(self) -> list[PassId]:
        """The passes that a trainer engine runs."""
        extra = [self.reference] if self.reference is not None and self.reference not in self.trainers else []
        return [trainer for trainer in (*self.trainers, *extra) if not trainer.recorded]


def passes_of(config: CompareConfig, recorded: Recorded | None = None) -> Passes:
    """The passes that a configuration asks for. Autocast applies to 16-bit types only: FP32 always has `cast`.

    Args:
        config: The configuration.
        recorded: Of a run `--from` a file: whose log-probs the file brings.
    """
    trainers = [
        PassId.trainer(dtype, mode)
        for dtype in config.trainer_dtypes
        for mode in (config.trainer_modes if dtype != "float32" else ("cast",))
    ]
    source = None
    if recorded is not None:
        source = RECORDED_ROLLOUT if recorded.rollout else RECORDED_TRAINER
        rollouts = [RECORDED_ROLLOUT] if recorded.rollout else []
        rollouts += [PassId.rollout(dtype, "replay") for dtype in config.rollout_dtypes] if config.replay else []
        if recorded.trainer:
            trainers = [RECORDED_TRAINER, *(trainers if config.rescore else [])]
    elif config.sequences == "shared":
        first, *others = config.rollout_dtypes
        rollouts = [PassId.rollout(first), *(PassId.rollout(dtype, "replay") for dtype in others)]
        source = rollouts[0]
    else:
        rollouts = [PassId.rollout(dtype) for dtype in config.rollout_dtypes]
    reference: PassId | None = PassId.trainer(config.reference)
    engines = any(not trainer.recorded for trainer in trainers)
    if not engines or (config.reference == "float32" and reference not in trainers):
        reference = None
    return Passes(tuple(rollouts), tuple(trainers), reference, source)


class RunDirectory(RunFolder[Manifest], PassTables):
    """A comparison's folder. `manifest` is the document behind `manifest.json`; assign to its fields, then `save`."""

    KIND: ClassVar[Kind] = COMPARISON
    DOCUMENT: ClassVar[type[Document]] = Manifest

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> RunDirectory:
        """Makes a new run folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        return cls._create(path, manifest)

    @property
    def manifest(self) -> Manifest:
        """The document."""
        return self.document

    @property
    def passes(self) -> Passes:
        """The passes that its configuration asks for."""
        return passes_of(self.manifest.config, self.manifest.recorded)

    def save(self) -> None:
        """Writes the manifest as it is now."""
        self.write(self.document)

    def record_of(self, pass_id: str) -> PassRecord | None:
        """What the manifest says of a pass; None where it has not been tried."""
        return self.manifest.passes.get(pass_id)

    def rows_of(self, pass_id: str) -> Mapping[str, int]:
        record = self.record_of(pass_id)
        return {} if record is None else record.rows

    def source_of(self, pass_id: str) -> str:
        record = self.record_of(pass_id)
        return pass_id if record is None else record.sequences_of or pass_id

    def finish_pass(self, pass_id: str, record: PassRecord, tables: Mapping[str, pa.Table]) -> None:
        """Stores a finished pass; after this call a resumed run will not compute it again.

        Args:
            pass_id: Which pass.
            record: What the manifest is to say of it; status and rows are filled in.
            tables: By kind: `tokens` or `reference`, and where it has them `sequences` and `exact`.
        """
        record.status, record.rows = "finished", self.write_pass(pass_id, tables)
        self.manifest.passes[pass_id] = record
        self.save()

    def finished(self, pass_id: str) -> bool:
        record = self.record_of(pass_id)
        return record is not None and record.status == "finished"

    def finished_passes(self) -> list[str]:
        return [pass_id for pass_id in self.manifest.passes if self.finished(pass_id)]

    def merge(self) -> None:
        """Merges the tables of all finished passes."""
        self.merge_passes(self.finished_passes())
