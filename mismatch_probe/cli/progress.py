"""Progress bars on stderr, with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from mismatch_probe.cli.output import printable
from mismatch_probe.probes.progress import Progress


class _Shown(Progress):
    """One bar per pass on a terminal; plain lines where stderr is a file."""

    def __init__(self, bars: Bars, console: Console) -> None:
        self._bars = bars
        self._console = console
        self._tasks: dict[str, TaskID] = {}

    def message(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False)

    def begin(self, pass_id: str, text: str) -> None:
        if self._console.is_terminal:
            if pass_id in self._tasks:  # a second attempt at the same pass
                self._bars.remove_task(self._tasks[pass_id])
            self._tasks[pass_id] = self._bars.add_task(f"{text}: starting", total=None)
        else:
            self.message(f"{text}: starting")

    def total(self, pass_id: str, tokens: int) -> None:
        if pass_id in self._tasks:
            self._bars.update(self._tasks[pass_id], total=tokens, description=pass_id)

    def advance(self, pass_id: str, tokens: int) -> None:
        if pass_id in self._tasks:
            self._bars.advance(self._tasks[pass_id], tokens)

    def end(self, pass_id: str, text: str) -> None:
        if pass_id in self._tasks:
            self._bars.remove_task(self._tasks.pop(pass_id))
        self.message(f"{pass_id}: {text}")


@contextmanager
def shown_progress(unit: str = "tokens") -> Iterator[Progress]:
    """Progress on stderr for the length of a command, counted in `unit`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _Shown(bars, console)
