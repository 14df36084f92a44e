"""`mismatch-probe rl gradient`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import json_option, run_parameters
from mismatch_probe.cli.output import print_json, show_report
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.config import CompareConfig
from mismatch_probe.errors import UsageError


@click.command(
    params=run_parameters(),
    epilog="Exit codes: 0 done, 1 error, 2 usage, 130 interrupted (the same command on RUN goes on).",
)
@click.argument("run", type=click.Path(), required=False)
@click.option(
    "--predict-length",
    "predict_lengths",
    multiple=True,
    type=int,
    metavar="TOKENS",
    help="Predict ESS at this response length; repeatable.  [default: the run's, or its longest response]",
)
@json_option
def command(run: str | None, out: str | None, as_json: bool, predict_lengths: tuple[int, ...], **options: Any) -> None:
    """What does the mismatch do to the policy gradient of a batch?

    Takes the rollouts and log-probs of a finished RUN of `compare`, or runs that first, adds one backward pass of the
    trainer in FP32 per sequence and weighting, and compares the gradient under each correction with the
    reference: weights π/μ per sequence, π by the FP32 trainer. No task is needed: advantages are synthetic.

    \b
    Examples:
      mismatch-probe rl gradient runs/smollm2-135m-20260101-120000
      mismatch-probe rl gradient --model ./my-checkpoint --num-prompts 32 --max-tokens 128
    """
    from mismatch_probe.report.gradient import gradient_report

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if run is not None and (given or out is not None):
        raise UsageError("Options of a new run cannot be combined with RUN.", "Give RUN alone.")
    source: str | CompareConfig = CompareConfig(**given) if run is None else run
    with shown_progress("sequences") as progress:
        result = mismatch_probe.rl_gradient(source, out=out, predict_lengths=predict_lengths, progress=progress)
    if as_json:
        print_json(result.document.content())
    else:
        show_report(gradient_report(result.document), result.path / "gradient")
