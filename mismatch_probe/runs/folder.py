"""What run folders have in common, whichever command wrote them: how they are made, opened, locked and continued."""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.files import LOCK

if TYPE_CHECKING:
    from mismatch_probe.results.base import Document

DocumentT = TypeVar("DocumentT", bound="Document")


@dataclass(frozen=True)
class Kind:
    """What a run folder is.

    Attributes:
        name: In messages.
        file: Its document.
        command: That writes it, and continues it with `--resume`.
    """

    name: str
    file: str
    command: str

    def held_by(self, path: Path) -> bool:
        """Whether a folder is of this kind."""
        return os.path.exists(path / self.file)  # which is no error where the path cannot be

    def resume(self, path: Path) -> str:
        """The command that continues a folder of this kind."""
        return f"mismatch-probe {self.command} --resume {path}"


COMPARISON = Kind("comparison", "manifest.json", "compare")
RL_RUN = Kind("RL run", "run.json", "rl run")
SWEEP = Kind("sweep", "sweep.json", "rl sweep")
SANITY_SET = Kind("sanity set", "sanity.json", "rl sanity-set")
DUMP = Kind("dump", "recorded.json", "ingest")
UNRELEASED = "Runs of unreleased versions have to be run again."
KINDS = (COMPARISON, SWEEP, RL_RUN, SANITY_SET, DUMP)


def kind_of(path: Path) -> Kind | None:
    """What a folder is; None where it is not a run folder."""
    return next((kind for kind in KINDS if kind.held_by(path)), None)


def read_document(path: Path, kind: Kind, document: type[DocumentT]) -> DocumentT:
    """The document of a run folder.

    Raises:
        TableError: The folder is of another kind, or its document cannot be read.
    """
    if not kind.held_by(path):
        other = kind_of(path)
        what = f"{path} holds no {kind.name}" + (f"; it is the folder of a {other.name}." if other else ".")
        fix = f"Give a folder that `mismatch-probe {kind.command}` wrote."
        raise TableError(what, fix if other else f"{fix} {UNRELEASED}")
    return document.read(path / kind.file)


class RunFolder(ABC, Generic[DocumentT]):
    """A run's folder, written by one process at a time.

    Attributes:
        path: The folder.
        document: The content of its file when the folder was opened, or last written here.
    """

    KIND: ClassVar[Kind]
    DOCUMENT: ClassVar[type[Document]]

    def __init__(self, path: Path, document: DocumentT) -> None:
        self.path, self.document = path, document

    @classmethod
    def _create(cls, path: Path, document: DocumentT) -> Self:
        """Makes a new folder.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
        """
        refuse_occupied(path)
        folder = cls(path, document)
        folder.write(document)
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens an existing folder.

        Raises:
            TableError: It is of another kind, or its document cannot be read.
        """
        return cls(path, read_document(path, cls.KIND, cls.DOCUMENT))  # type: ignore[arg-type]

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether nothing is left to run."""

    @property
    @abstractmethod
    def model_files(self) -> Mapping[str, str] | None:
        """SHA-256 of the files of the model that it began with, by name; None where they are not known yet."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Where it began: `cpu` or `cuda`."""

    def write(self, document: DocumentT) -> None:
        """Replaces the document, atomically."""
        self.document = document
        document.write(self.path / self.KIND.file)


def refuse_occupied(path: Path) -> None:
    """Checks that a new run may be made at `path`.

    Raises:
        UsageError: The folder exists and is not empty, or is no folder.
    """
    try:
        occupied = any(entry.name != LOCK for entry in path.iterdir())
    except FileNotFoundError:
        occupied = False
    except OSError as error:
        raise UsageError(
            f"{path} cannot be used as a run folder ({error.strerror}).", "Choose another --out."
        ) from None
    if occupied:
        raise UsageError(f"{path} is not empty.", "Choose another --out, or continue the run with --resume.")


def run_folder(out: str | Path | None, name: str = "") -> Path:
    """Where a new run goes: `out`, or by default `runs/<name>-<local time>`."""
    if out is not None:
        return Path(out)
    name = re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-") or "model"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
