"""`mismatch-probe plot`."""

from __future__ import annotations

import click

import mismatch_probe
from mismatch_probe.cli.options import run_argument


@click.command(epilog="Needs no engine: figures are drawn from the run's tables.")
@run_argument
def command(run: str) -> None:
    """Draws the figures of a finished RUN again.

    \b
    Example:
      mismatch-probe plot runs/smollm2-135m-20260101-120000
    """
    for path in mismatch_probe.Run.open(run).plot().values():
        click.echo(str(path))
