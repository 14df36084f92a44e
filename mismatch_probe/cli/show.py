"""`mismatch-probe show`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mismatch_probe.cli.options import run_argument
from mismatch_probe.cli.output import print_json, printable
from mismatch_probe.errors import EXIT_OK

if TYPE_CHECKING:
    from mismatch_probe.runs.state import RunState

_SHOWN = 8


@click.command(epilog="Exit codes: 0 done, 1 error, 2 usage.")
@run_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(run: str, as_json: bool) -> int:
    """What a run folder is, how far it has come, what continues it, and what it holds.

    \b
    Example:
      mismatch-probe show runs/smollm2-135m-20260101-120000
    """
    from mismatch_probe.runs.state import state_of

    state = state_of(Path(run))
    if as_json:
        print_json(as_dict(state))
        return EXIT_OK
    click.echo(printable(f"{state.path}: {first_line(state)}"))
    for name, text in (("created", state.created), ("answer", headline(state))):
        if text:
            click.echo(printable(f"{name:<10}{text}"))
    for one in state.missing[:_SHOWN]:
        click.echo(printable(f"{'missing':<10}{one.what}{': ' + one.why if one.why else ''}"))
    if len(state.missing) > _SHOWN:
        click.echo(f"{'':<10}and {len(state.missing) - _SHOWN} more")
    if state.resume:
        click.echo(printable(f"{'continue':<10}{state.resume}"))
    click.echo(f"{'holds':<10}{', '.join(state.documents)}")
    return EXIT_OK


def first_line(state: RunState) -> str:
    """What the folder is, its status, and how much is missing."""
    missing = f", {len(state.missing)} missing" if state.missing else ""
    return f"{state.kind.name} of {state.model}, {state.status}{missing}"


def headline(state: RunState) -> str:
    """The first finding as a sentence; empty where there is none."""
    if state.finding is None:
        return ""
    from mismatch_probe.report.words import say

    return say(state.finding)


def as_dict(state: RunState) -> dict[str, Any]:
    """As JSON has it."""
    found = asdict(state) | {"path": str(state.path), "kind": state.kind.name, "headline": headline(state)}
    del found["finding"]
    return found
