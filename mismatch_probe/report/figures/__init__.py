"""Figures: each is registered once, beside the function that draws it, and belongs to the kind of data that it shows.

A module of this package registers the figures of one kind of data. `draw` draws all that the data serve, `figures_of`
lists them in the order of a report.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mismatch_probe.files import atomic_path
from mismatch_probe.registered import Registry
from mismatch_probe.results.base import Document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = TypeVar("Data")
_BEGINNING = 1 << 12
_MOST_PROCESSES = 4


@dataclass(frozen=True)
class FigureInfo:
    """A registered figure.

    Attributes:
        name: Its file is `<name>.png`.
        of: Type of the data that it shows.
        title: Short title.
        guide: One sentence on how to read it.
        alt: What is drawn, for who cannot see it: axes, marks, and what belongs to what.
        draw: Data to figure.
        needs: Whether the data serve.
        order: Its place in a report, from 0.
    """

    name: str
    of: type[Any]
    title: str
    guide: str
    alt: str
    draw: Callable[[Any], Figure]
    needs: Callable[[Any], bool]
    order: int


_REGISTRY = Registry[FigureInfo](__name__, "figure")
_work: Callable[[str], object]


def figure(
    name: str,
    of: type[Data],
    title: str,
    guide: str,
    alt: str,
    needs: Callable[[Data], bool] = lambda _: True,
    order: int = 0,
) -> Callable[[Callable[[Data], Figure]], Callable[[Data], Figure]]:
    """Registers a figure.

    Raises:
        ValueError: The name is taken.
    """

    def register(draw: Callable[[Data], Figure]) -> Callable[[Data], Figure]:
        _REGISTRY.add(name, FigureInfo(name, of, title, guide, alt, draw, needs, order))
        return draw

    return register


def all_figures() -> dict[str, FigureInfo]:
    """Every registered figure, in the order of a report."""
    return dict(sorted(_REGISTRY.all().items(), key=lambda item: (item[1].order, item[0])))


def figures_of(data: object) -> list[FigureInfo]:
    """The figures that these data serve."""
    return [info for info in all_figures().values() if isinstance(data, info.of) and info.needs(data)]


def draw(data: object, folder: Path) -> dict[str, Path]:
    """Draws what the data serve into `folder` as PNG, each by atomic rename; returns the files by name.

    The files carry no date and no version, so equal data gives equal bytes with one matplotlib. Figures of a document
    carry a digest of it, and are drawn only where it differs.

    Raises:
        DiskFull: No space is left on the device.
        TableError: A file cannot be written.
    """
    digest = _digest(data) if isinstance(data, Document) else ""
    found = {info.name: folder / f"{info.name}.png" for info in figures_of(data)}
    missing = [name for name, path in found.items() if not digest or not _shows(path, digest)]
    _side_by_side(lambda name: save(_REGISTRY.known[name].draw(data), found[name], digest), missing)
    return found


def _side_by_side(work: Callable[[str], object], names: list[str]) -> None:
    """Calls `work` with each name: on Linux in forked processes, so that the data need not travel."""
    at_once = min(len(names), len(os.sched_getaffinity(0)), _MOST_PROCESSES) if sys.platform == "linux" else 1
    if at_once < 2:
        for name in names:
            work(name)
        return
    # Imported here, once, instead of in every process.
    import matplotlib.backends.backend_agg  # noqa: F401

    import mismatch_probe.report.figures.style  # noqa: F401

    with ProcessPoolExecutor(at_once, get_context("fork"), initializer=_begin, initargs=(work,)) as pool:
        for _ in pool.map(_call, names):
            pass


def _begin(work: Callable[[str], object]) -> None:
    """In a forked process: what `_call` calls. Ctrl-C is the parent's."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(name: str) -> None:
    _work(name)


def _digest(document: Document) -> str:
    """Of a document and of what draws it."""
    known = hashlib.sha256(f"{version('matplotlib')} {document.model_dump_json()}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        known.update(file.read_bytes())
    return known.hexdigest()


def _shows(path: Path, digest: str) -> bool:
    """Whether a file is the figure that `save` wrote for a digest, which lies near its beginning."""
    try:
        with path.open("rb") as handle:
            return f"Comment\0{digest}".encode() in handle.read(_BEGINNING)
    except OSError:
        return False


def save(drawn: Figure, path: Path, digest: str = "") -> Path:
    """Writes a figure as PNG by atomic rename, with the digest of its data."""
    from mismatch_probe.report.figures.style import DPI, plot_settings

    with atomic_path(path) as partial, plot_settings(), warnings.catch_warnings():
        # A reason quoted from an engine may hold characters that the font lacks; a box in its place is fine.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawn.savefig(
            partial, format="png", dpi=DPI, metadata={"Software": None, **({"Comment": digest} if digest else {})}
        )
    return path


def captions(names: Mapping[str, object]) -> dict[str, FigureInfo]:
    """What the registry knows of drawn figures, by name."""
    known = all_figures()
    return {name: known[name] for name in names if name in known}
