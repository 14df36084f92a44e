"""`mismatch-probe rl sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import json_option
from mismatch_probe.cli.output import print_json, printable
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.errors import UsageError

if TYPE_CHECKING:
    from mismatch_probe.rl.sweep_run import SweepResult


@click.command(
    epilog="Exit codes: 0 done, 1 error or a cell failed, 2 usage, 3 a run without injected stress collapsed or "
    "diverged, 130 interrupted (--resume goes on)."
)
@click.argument("plan", type=click.Path(), required=False)
@click.option("--resume", type=click.Path(), metavar="SWEEP", help="Go on with this sweep's cells that have not ended.")
@click.option("--out", type=click.Path(), help="New folder for the sweep.  [default: runs/rl-sweep-MODEL-TIME]")
@click.option("--workers", type=int, help="Runs at once.  [default: one per core or GPU]")
@click.option("--check", is_flag=True, help="Validate the plan, print its cells, and run nothing.")
@json_option
def command(
    plan: str | None, resume: str | None, out: str | None, workers: int | None, check: bool, as_json: bool
) -> int:
    """Run the grid of a PLAN: precision × algorithm × learning rate × injected stress × seed.

    \b
    A plan is a TOML file:
      [base]                      # keys of `rl run`'s configuration
      steps = 60
      [[grid]]                    # every combination; several grids add up
      precision = ["bf16", "fp16", "fp32"]
      stress = ["none", "weight-noise:0.2"]
      seeds = 8

    \b
    Examples:
      mismatch-probe rl sweep plan.toml --check
      mismatch-probe rl sweep plan.toml --out runs/precision
      mismatch-probe rl sweep --resume runs/precision
    """
    if (plan is None) == (resume is None):
        raise UsageError("A sweep needs a PLAN or --resume.", "Give one of them.")
    if resume is not None and out is not None:
        raise UsageError("--out cannot be combined with --resume.", "Leave --out out.")
    if check:
        if plan is None:
            raise UsageError("--check cannot be combined with --resume.", "Give a PLAN.")
        print_json([cell_row(cell) for cell in mismatch_probe.read_rl_plan(plan)])
        return 0
    with shown_progress("steps") as progress:
        if resume is not None:
            result = mismatch_probe.rl_sweep_resume(resume, workers=workers, progress=progress)
        else:
            assert plan is not None
            cells = mismatch_probe.read_rl_plan(plan)
            result = mismatch_probe.rl_sweep(cells, out=out, workers=workers, progress=progress)
    return show_sweep(result, as_json)


def cell_row(cell: Any) -> dict[str, Any]:
    return {"name": cell.name, "arm": cell.arm, "config": cell.config.as_dict()}


def show_sweep(result: SweepResult, as_json: bool) -> int:
    """Prints a sweep's arms and its reading, or everything as JSON."""
    if as_json:
        print_json({"path": str(result.path), **result.summary})
        return result.exit_code
    from rich.console import Console
    from rich.text import Text

    from mismatch_probe.report.rl_page import print_arms

    console = Console()
    print_arms(result.arms, console)
    for text in (*result.summary["reading"], *(f"Note: {note}" for note in result.summary["notes"])):
        console.print(Text(printable(text)))
    click.echo(f"Report: {result.path / 'report.html'}")
    return result.exit_code
