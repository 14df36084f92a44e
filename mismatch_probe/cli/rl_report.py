"""`mismatch-probe rl report`."""

from __future__ import annotations

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option
from mismatch_probe.cli.output import show_result


@click.command(epilog="Needs no engine. Exit codes: as those of the sweep or run.")
@click.argument("folder", type=click.Path())
@click.option(
    "--place", "runs", type=click.Path(), multiple=True, metavar="RUN", help="A `compare` run to place; repeatable."
)
@click.option(
    "--planned-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Response length to place at."
)
@json_option
def command(folder: str, runs: tuple[str, ...], planned_tokens: int, as_json: bool) -> int:
    """Computes the report of a sweep or an RL run in FOLDER again. A sweep can have your own model placed among its
    arms.

    \b
    Example:
      mismatch-probe rl report runs/rl-demo --place runs/my-model --planned-tokens 2048
    """
    result = mismatch_probe.rl_report(folder, place=runs, planned_tokens=planned_tokens)
    return show_result(result, as_json)
