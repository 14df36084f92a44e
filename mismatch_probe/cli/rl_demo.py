"""`mismatch-probe rl demo`."""

from __future__ import annotations

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option
from mismatch_probe.cli.output import show_result
from mismatch_probe.cli.progress import shown_progress


@click.command(
    epilog="Exit codes: 0 done, 1 error or a run failed, 2 usage, 3 a run without injected stress collapsed or "
    "diverged, 130 interrupted (rl sweep --resume goes on)."
)
@click.option("--out", type=click.Path(), help="New folder.  [default: runs/rl-demo-chain-TIME]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each arm.")
@click.option("--workers", type=int, help="Runs at once.  [default: one per core or GPU]")
@json_option
def command(out: str | None, seeds: int, workers: int | None, as_json: bool) -> int:
    """Three precisions and four doses of injected stress, each a short RL fine-tune: what does a mismatch do?

    Trains the small model that comes with the tool, within 10 minutes on 2 cores, and writes one report.

    \b
    Example:
      mismatch-probe rl demo --out runs/rl-demo
    """
    with shown_progress("steps") as progress:
        result = mismatch_probe.rl_demo(out=out, seeds=seeds, workers=workers, progress=progress)
    return show_result(result, as_json)
