"""Renderers: HTML, Markdown and terminal. They know the blocks of a report and no command. `write_report` writes the
pages.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mismatch_probe.files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mismatch_probe.report.model import Report


def write_report(report: Report, figures: Mapping[str, Path], folder: Path) -> None:
    """Writes both pages atomically.

    Raises:
        DiskFull: No space is left on the device.
        TableError: A file cannot be written.
    """
    from mismatch_probe.report.render.html import html_page
    from mismatch_probe.report.render.markdown import markdown_page

    write_text(folder / "report.html", html_page(report, figures))
    relative = {name: Path(os.path.relpath(path, folder)) for name, path in figures.items()}
    write_text(folder / "report.md", markdown_page(report, relative))
