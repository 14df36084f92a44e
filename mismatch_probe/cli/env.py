"""`mismatch-probe env`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.output import print_json
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK


@click.command(epilog="Exit codes: 0 a comparison can run here, 3 it cannot.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> int:
    """What is installed, and which engines and dtypes are usable on this device, or why not.

    \b
    Example:
      mismatch-probe env
    """
    found = mismatch_probe.env()
    if as_json:
        print_json(found)
    else:
        _print(found)
    return EXIT_OK if all(engine["usable"] for engine in found["engines"].values()) else EXIT_LIMIT


def _print(found: dict[str, Any]) -> None:
    machine = found["machine"]
    click.echo(f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['platform']}")
    click.echo(f"GPUs      {', '.join(machine['gpus']) or 'none'}")
    click.echo(f"packages  {', '.join(f'{name} {number}' for name, number in found['versions'].items())}")
    for name, engine in found["engines"].items():
        click.echo(f"{name:<9} {'usable' if engine['usable'] else 'not usable: ' + engine['why']}")
        if engine["usable"]:
            for dtype, why in engine["dtypes"].items():
                click.echo(f"          {dtype:<9} {'yes' if not why else 'no: ' + why}")
    if found["device"] == "cpu" and not machine["bf16_instructions"]:
        click.echo("note      this CPU has no BF16 instructions: 16-bit types are emulated and slow")
