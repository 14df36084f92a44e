"""`mismatch-probe audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import json_option, run_parameters
from mismatch_probe.cli.output import print_json
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.config import CompareConfig
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK, UsageError


@click.command(
    params=run_parameters("exact_kl", "trainer_layout", "eager", "rollout_batch", "engine_args"),
    epilog="Exit codes: 0 ok or warn, 1 error, 2 usage, 3 fail, inconclusive or worse than the baseline (--strict: a "
    "warning, too), 130 interrupted.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(),
    metavar="SOURCE",
    help="Recorded sequences (.jsonl or .parquet) to compare, or a finished run, which is judged without engines.",
)
@click.option("--resume", type=click.Path(), metavar="RUN", help="Run what is missing of this run, and judge it.")
@click.option("--profile", help="default, nemo-rl, verl, prime-rl, strict, or a TOML file.  [default: default]")
@click.option("--planned-tokens", type=int, help="Response length of the RL run.  [default: 8 times the longest here]")
@click.option(
    "--step-tokens", type=int, help="Tokens that a step's loss averages over.  [default: 128 planned responses]"
)
@click.option(
    "--learning-rate",
    "learning_rates",
    multiple=True,
    type=float,
    help="For the engine's lag; repeatable.  [default: 1e-6 and 1e-5]",
)
@click.option(
    "--pair",
    "pairs",
    multiple=True,
    metavar="ROLLOUT/TRAINER",
    help="This precision pair decides; repeatable.  [default: the recommended one]",
)
@click.option("--baseline", type=click.Path(), metavar="AUDIT", help="Compare with this audit.json, or its run.")
@click.option("--strict", is_flag=True, default=None, help="Exit 3 on a warning, too.")
@json_option
def command(
    source: str | None,
    resume: str | None,
    out: str | None,
    baseline: str | None,
    as_json: bool,
    **given: Any,
) -> int:
    """May this model go into RL, in which precision, with which correction?

    Runs `compare`, measures what FP16 can hold of the model (activations, weights, gradients, a real forward and
    backward pass) and how far a 16-bit engine lags behind its trainer, and judges every precision pair.

    \b
    Examples:
      mismatch-probe audit --model ./my-checkpoint --planned-tokens 4096
      mismatch-probe audit --model ./my-checkpoint --pair bf16/bf16 --profile nemo-rl --strict
      mismatch-probe audit --from runs/smollm2-135m-20260101-120000
      mismatch-probe audit --model ./my-checkpoint --baseline runs/before/audit/audit.json
    """
    from rich.console import Console

    from mismatch_probe.report.audit import audit_report
    from mismatch_probe.report.render.terminal import print_report

    chosen = {name: value for name, value in given.items() if value is not None and value != ()}
    own = ("profile", "planned_tokens", "step_tokens", "learning_rates", "pairs", "strict")
    options = {name: chosen.pop(name) for name in own if name in chosen}
    if source is not None and resume is not None:
        raise UsageError(
            "--from and --resume cannot be combined.", "Use --from to run no engine, --resume to run missing passes."
        )
    if source is not None and Path(source).is_file():
        chosen["source"], source = source, None
    if (source or resume) and (chosen or out is not None):
        raise UsageError("Options of a new run cannot be combined with --from or --resume.", "Leave them out.")
    with shown_progress() as progress:
        if source is not None:
            result = mismatch_probe.audit_run(source, baseline=baseline, **options)
        elif resume is not None:
            result = mismatch_probe.audit_resume(resume, baseline=baseline, progress=progress, **options)
        else:
            result = mismatch_probe.audit(
                CompareConfig(**chosen), out=out, baseline=baseline, progress=progress, **options
            )
    if as_json:
        print_json(result.audit.content())
    else:
        print_report(audit_report(result.audit, result.path), Console())
    click.echo(f"Report: {result.path / 'audit' / 'report.html'}", err=True)
    return EXIT_LIMIT if result.failed else EXIT_OK
