"""A run that a command works on: made or opened, locked, of the same model throughout, and continued by one command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from mismatch_probe.engines.models import ModelRef
from mismatch_probe.errors import Interrupted, TableError, UsageError
from mismatch_probe.files import locked
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.model import Report
from mismatch_probe.runs.folder import RunFolder, refuse_occupied, run_folder

FolderT = TypeVar("FolderT", bound=RunFolder[Any])
DataT = TypeVar("DataT")


class Session(Generic[FolderT]):
    """A run that a command works on, locked by it.

    Attributes:
        run: Its folder.
        progress: Told about what is done.
    """

    def __init__(self, run: FolderT, progress: Progress | None) -> None:
        self.run, self.progress = run, progress or Progress()

    @classmethod
    @contextmanager
    def new(
        cls, make: Callable[[Path], FolderT], name: str, out: str | Path | None, progress: Progress | None
    ) -> Iterator[Self]:
        """A new run.

        Args:
            make: Makes its folder, with where it comes from.
            name: Of the folder under `runs/`, before the time.
            out: The folder, None for that one.
            progress: Told about what is done.

        Raises:
            UsageError: The folder exists and is not empty, or is no folder.
            FolderBusy: Another process uses it.
        """
        path = run_folder(out, name)
        refuse_occupied(path)  # before the lock, which would leave its file in a folder that is none of ours
        with locked(path):
            yield cls(make(path), progress)

    @classmethod
    @contextmanager
    def resume(cls, kind: type[FolderT], path: Path, progress: Progress | None) -> Iterator[Self]:
        """A run that is there.

        Raises:
            TableError: The folder is of another kind, or its document cannot be read.
            FolderBusy: Another process uses it.
        """
        kind.open(path)  # before the lock, which would make the folder
        with locked(path):
            yield cls(kind.open(path), progress)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return self.run.complete

    @contextmanager
    def stoppable(self, kept: str, command: str = "") -> Iterator[None]:
        """Turns Ctrl-C into an error that names what continues the run.

        Args:
            kept: What stays on disk, e.g. `finished passes are kept`.
            command: That continues; by default `--resume` of the command that made the folder.

        Raises:
            Interrupted: The user stopped it.
        """
        try:
            yield
        except KeyboardInterrupt:
            command = command or self.run.KIND.resume(self.run.path)
            raise Interrupted(f"Stopped; {kept}.", f"Continue with: {command}") from None


def check_files(run: RunFolder[Any], now: Mapping[str, str]) -> None:
    """Checks that a run goes on with the model that it began with.

    Args:
        run: The run.
        now: SHA-256 of the model's files, by name.

    Raises:
        TableError: They have changed.
    """
    if run.model_files is not None and run.model_files != now:
        raise TableError("The model's files have changed since this run began.", "Start a new run.")


def check_device(run: RunFolder[Any], device: str) -> None:
    """Checks that a run goes on where it began.

    Raises:
        UsageError: It began on another kind of device.
    """
    if device != run.device:
        raise UsageError(
            f"This run began on {run.device}, and this machine offers {device}.",
            "Continue it where it began; `report` works anywhere.",
        )


def same_model(run: RunFolder[Any], model: ModelRef) -> ModelRef:
    """The model, of which every file is as it was when the run began.

    Raises:
        TableError: A file has changed.
    """
    check_files(run, model.file_hashes())
    return model


def write_pages(
    data: DataT, report: Callable[[DataT], Report], folder: Path, figures: Path | None = None
) -> dict[str, Path]:
    """Draws the figures that the data serve and writes the report with them.

    Args:
        data: What is shown.
        report: Makes a report of it.
        folder: Where to.
        figures: Where the figures go; None for `figures/` there.

    Returns:
        Figure files by name.
    """
    from mismatch_probe.report.figures import draw
    from mismatch_probe.report.render import write_report

    drawn = draw(data, figures or folder / "figures")
    write_report(report(data), drawn, folder)
    return drawn
