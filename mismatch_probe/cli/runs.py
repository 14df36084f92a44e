"""`mismatch-probe runs`."""

from __future__ import annotations

from pathlib import Path

import click

from mismatch_probe.cli.output import print_json, printable
from mismatch_probe.cli.show import as_dict, first_line, headline
from mismatch_probe.errors import EXIT_OK


@click.command(epilog="Exit codes: 0 done, 1 error, 2 usage.")
@click.argument("folder", type=click.Path(), default="runs")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(folder: str, as_json: bool) -> int:
    """Run folders in a folder (default: runs): kind, model, date, status, answer.

    \b
    Example:
      mismatch-probe runs
    """
    from mismatch_probe.runs.state import states_of

    found, damaged = states_of(Path(folder))
    if as_json:
        print_json({"runs": [as_dict(state) for state in found], "damaged": damaged})
        return EXIT_OK
    for state in found:
        click.echo(printable(f"{state.path.name}  {first_line(state)}, {state.created[:16].replace('T', ' ')}"))
        if answer := headline(state):
            click.echo(printable(f"    {answer}"))
    for name, why in damaged.items():
        click.echo(printable(f"{name}  cannot be read: {why}"))
    if not found and not damaged:
        click.echo(printable(f"{folder} holds no run."), err=True)
    return EXIT_OK
