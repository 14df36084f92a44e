"""`mismatch-probe plot`."""

from __future__ import annotations

import click

import mismatch_probe


@click.command(epilog="Needs no engine: figures are drawn from the run's tables.")
@click.argument("run", type=click.Path())
def command(run: str) -> None:
    """Draws the figures of a finished RUN again.

    \b
    Example:
      mismatch-probe plot runs/smollm2-135m-20260101-120000
    """
    for path in mismatch_probe.plot(run).values():
        click.echo(str(path))
