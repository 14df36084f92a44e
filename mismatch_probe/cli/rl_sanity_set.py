"""`mismatch-probe rl sanity-set`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import json_option
from mismatch_probe.cli.output import print_json, show_report
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.errors import UsageError


@click.command(epilog="Exit codes: 0 done, 1 error, 2 usage, 130 interrupted (--resume goes on).")
@click.option(
    "--model", help="Built-in name, checkpoint folder, or hub id.  [default: chain, which comes with the tool]"
)
@click.option("--task", type=click.Choice(["chain", "reasoning", "math"]), help="[default: chain]")
@click.option("--problems", type=click.Path(), help="JSONL of problem and answer; --task math needs it.")
@click.option("--n-problems", type=int, help="Problems that are tried.  [default: all of the file, or 128 drawn ones]")
@click.option("--chat", is_flag=True, default=None, help="Render problems through the model's chat template.")
@click.option("--n-samples", type=int, help="Responses to each problem.  [default: 40]")
@click.option(
    "--keep", type=float, nargs=2, metavar="LOW HIGH", help="Accuracy of what is kept, inclusive.  [default: 0.2 0.8]"
)
@click.option("--max-tokens", type=int, help="Response budget.  [default: 64]")
@click.option("--temperature", type=float, help="[default: 1]")
@click.option("--rollout-dtype", help="What vLLM runs in.  [default: bfloat16]")
@click.option("--seed", type=int, help="Of everything.  [default: 0]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]")
@click.option("--out", type=click.Path(), help="New folder.  [default: runs/sanity-set-MODEL-TIME]")
@click.option("--resume", type=click.Path(), metavar="RUN", help="Sample what is missing in this folder.")
@json_option
def command(out: str | None, resume: str | None, as_json: bool, **flags: Any) -> int:
    """Keep the problems that a model solves sometimes: an RL run that is sound must learn all of them.

    The construction of arXiv 2510.26788: 40 samples of each problem, kept where 20 to 80 % of them are right. `rl run`
    on the set passes where its reward exceeds 95 %.

    \b
    Examples:
      mismatch-probe rl sanity-set --task chain
      mismatch-probe rl sanity-set --model ./checkpoint --task math --problems math.jsonl --max-tokens 8192 --chat
      mismatch-probe rl sanity-set --resume runs/sanity-set-chain-20260101-120000
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if resume is not None and (given or out):
        raise UsageError("Options of a new run cannot be combined with --resume.", "Use --resume alone.")
    with shown_progress() as progress:
        if resume is not None:
            result = mismatch_probe.rl_sanity_set_resume(resume, progress=progress)
        else:
            result = mismatch_probe.rl_sanity_set(out=out, progress=progress, **given)
    if as_json:
        print_json({"path": str(result.path), **result.document.content()})
    else:
        show_report(result.report(), result.path)
    return 0
