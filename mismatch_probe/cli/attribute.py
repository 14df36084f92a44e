"""`mismatch-probe attribute`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import NameList, json_option, run_parameters
from mismatch_probe.cli.output import print_json
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.config import CompareConfig
from mismatch_probe.errors import EXIT_ERROR, EXIT_OK, UsageError
from mismatch_probe.types import DTYPES

# The pair decides these.
_NOT_HERE = ("rollout_dtypes", "trainer_dtypes", "temperature")


@click.command(
    params=[
        parameter
        for parameter in run_parameters("trainer_layout", "eager", "rollout_batch", "engine_args")
        if parameter.name not in _NOT_HERE
    ],
    epilog="Exit codes: 0 done, 1 error or a setting failed, 2 usage, 130 interrupted.",
)
@click.option("--pair", metavar="ROLLOUT/TRAINER", help="Whose gap; one dtype means both.  [default: bfloat16]")
@click.option(
    "--settings",
    metavar="LIST",
    help="default, all, none, or names (see --plan); rollout: or trainer: before one means that side.",
)
@click.option("--layers/--no-layers", default=None, help="Look inside both models.  [default: yes]")
@click.option("--layer-dtypes", type=NameList(DTYPES), help="In which dtypes.  [default: all three]")
@click.option(
    "--target",
    type=float,
    metavar="FRACTION",
    help="Stop when the remaining gap is at or below this fraction.  [default: 4/5 of what an FP32 trainer closes]",
)
@click.option(
    "--from",
    "source",
    type=click.Path(),
    metavar="RUN",
    help="Compute the attribution of this run again, without engines.",
)
@click.option("--resume", type=click.Path(), metavar="RUN", help="Run what is missing in this run.")
@click.option("--plan", "plan_only", is_flag=True, help="Print processes and settings, and run nothing.")
@json_option
def command(
    source: str | None,
    resume: str | None,
    out: str | None,
    plan_only: bool,
    as_json: bool,
    settings: str | None,
    **given: Any,
) -> int:
    """Where does the mismatch come from: which rung, which setting, which layer?

    Compares one pair of dtypes, then runs the same tokens again: decode against prefill, batching, one setting of
    vLLM or of the trainer after another, and both models layer by layer and module by module.

    \b
    Examples:
      mismatch-probe attribute
      mismatch-probe attribute --model ./my-checkpoint --pair bf16/bf16 --settings default,compiled
      mismatch-probe attribute --model ./my-checkpoint --settings kv-fp8,trainer:fp32-head --no-layers
      mismatch-probe attribute --resume runs/smollm2-135m-20260101-120000
    """
    from rich.console import Console

    from mismatch_probe.report.attribution import plan_report
    from mismatch_probe.report.render.terminal import print_report

    chosen = {name: value for name, value in given.items() if value is not None and value != ()}
    options: dict[str, Any] = {
        name: chosen.pop(name) for name in ("pair", "layers", "layer_dtypes", "target") if name in chosen
    }
    if settings is not None:
        options["settings"] = tuple(part.strip() for part in settings.split(",") if part.strip())
    if source is not None and resume is not None:
        raise UsageError(
            "--from and --resume cannot be combined.", "Use --from to run no engine, --resume to run missing passes."
        )
    if (source or resume) and (chosen or out is not None or plan_only):
        raise UsageError("Options of a new run cannot be combined with --from or --resume.", "Leave them out.")
    if plan_only:
        plan = mismatch_probe.attribute_plan(CompareConfig(**chosen), **options)
        print_json(plan.model_dump(mode="json")) if as_json else print_report(plan_report(plan), Console())
        return EXIT_OK
    with shown_progress() as progress:
        if source is not None:
            result = mismatch_probe.attribute_run(source, **options)
        elif resume is not None:
            result = mismatch_probe.attribute_resume(resume, progress=progress, **options)
        else:
            result = mismatch_probe.attribute(CompareConfig(**chosen), out=out, progress=progress, **options)
    if as_json:
        print_json(result.attribution.content())
    else:
        print_report(result.report(), Console())
    click.echo(f"Report: {result.page}", err=True)
    if result.failed:
        click.echo(
            f"{', '.join(result.failed)} failed; try again with: mismatch-probe attribute --resume {result.path}",
            err=True,
        )
        return EXIT_ERROR
    return EXIT_OK
