"""`mismatch-probe attribute`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.options import (
    RunPath,
    json_option,
    out_option,
    resume_option,
    run_asked,
    settings_command,
)
from mismatch_probe.cli.output import print_json
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.config import AttributeOptions
from mismatch_probe.config.commands import AttributeSettings
from mismatch_probe.errors import EXIT_ERROR, EXIT_OK


@settings_command(
    AttributeSettings, epilog="Exit codes: 0 done, 1 error or a setting failed, 2 usage, 130 interrupted."
)
@out_option("runs/MODEL-TIME")
@click.option(
    "--from",
    "source",
    type=RunPath(),
    metavar="RUN",
    help="Attribute this run again, without engines.",
)
@resume_option
@click.option("--plan", "plan_only", is_flag=True, help="Print processes and settings, and run nothing.")
@json_option
def command(
    values: dict[str, Any], source: str | None, resume: str | None, out: str | None, plan_only: bool, as_json: bool
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

    others = {"out": out, "plan_only": plan_only}
    path = run_asked(values, source, resume, AttributeOptions.model_fields, others)
    if plan_only:
        plan = mismatch_probe.attribute_plan(**values)
        print_json(plan.model_dump(mode="json")) if as_json else print_report(plan_report(plan), Console())
        return EXIT_OK
    with shown_progress() as progress:
        if path is not None:
            run = mismatch_probe.Run.open(path)
            result = run.attribute(engines=source is None, progress=progress, **values)
        else:
            result = mismatch_probe.attribute(out=out, progress=progress, **values)
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
