"""`mismatch-probe rl sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option
from mismatch_probe.cli.output import print_json, show_result
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.errors import UsageError

if TYPE_CHECKING:
    from mismatch_probe.rl.plan import PlannedRun


@click.command(
    epilog="Exit codes: 0 done, 1 error or a run failed, 2 usage, 3 a run without injected stress collapsed or "
    "diverged, 130 interrupted (--resume goes on)."
)
@click.argument("plan", type=click.Path(), required=False)
@click.option("--resume", type=click.Path(), metavar="SWEEP", help="Continue this sweep: the runs that have not ended.")
@click.option("--out", type=click.Path(), help="New folder for the sweep.  [default: runs/rl-sweep-MODEL-TIME]")
@click.option("--workers", type=int, help="Runs at once.  [default: one per core or GPU]")
@click.option("--seeds", type=click.IntRange(min=1), help="Seeds of every arm, from 0.  [default: the plan's]")
@click.option("--check", is_flag=True, help="Validate the plan, print its runs, and start nothing.")
@json_option
def command(
    plan: str | None,
    resume: str | None,
    out: str | None,
    workers: int | None,
    seeds: int | None,
    check: bool,
    as_json: bool,
) -> int:
    """Run the grid of a PLAN: precision × algorithm × learning rate × injected stress × seed.

    \b
    A PLAN is the folder of an earlier sweep, whose arms it takes, or a TOML file:
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
      mismatch-probe rl sweep runs/precision --seeds 8
    """
    if (plan is None) == (resume is None):
        raise UsageError("A sweep needs a PLAN or --resume.", "Give one of them.")
    for name, value in (("--out", out), ("--seeds", seeds)):
        if resume is not None and value is not None:
            raise UsageError(f"{name} cannot be combined with --resume.", f"Remove {name}.")
    if check:
        if plan is None:
            raise UsageError("--check cannot be combined with --resume.", "Give a PLAN.")
        print_json([run_row(run) for run in mismatch_probe.read_rl_plan(plan, seeds=seeds)])
        return 0
    with shown_progress("steps") as progress:
        if resume is not None:
            result = mismatch_probe.rl_sweep_resume(resume, workers=workers, progress=progress)
        else:
            assert plan is not None
            runs = mismatch_probe.read_rl_plan(plan, seeds=seeds)
            result = mismatch_probe.rl_sweep(runs, out=out, workers=workers, progress=progress)
    return show_result(result, as_json)


def run_row(run: PlannedRun) -> dict[str, Any]:
    return {"name": run.name, "arm": run.arm, "config": run.config.model_dump()}
