"""The folder of a comparison: its manifest and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from mismatch_probe.results.base import Document
from mismatch_probe.results.manifest import Manifest, PassRecord
from mismatch_probe.runs.folder import COMPARISON, Kind, RunFolder
from mismatch_probe.runs.passes import Passes, passes_of
from mismatch_probe.tables import PassTables


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
    def complete(self) -> bool:
        return self.manifest.status == "complete"

    @property
    def model_files(self) -> Mapping[str, str] | None:
        return self.manifest.model.files

    @property
    def device(self) -> str:
        return self.manifest.device

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

    def finish_pass(
        self, pass_id: str, record: PassRecord, tables: Mapping[str, pa.Table | Iterator[pa.Table]]
    ) -> None:
        """Stores a finished pass; after this call a resumed run will not compute it again.

        Args:
            pass_id: Which pass.
            record: What the manifest is to say of it; status and rows are filled in.
            tables: By kind, as `write_pass` takes them.
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
