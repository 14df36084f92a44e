"""`mismatch-probe compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option, only_new, out_option, resume_option, settings_command
from mismatch_probe.cli.output import print_json, printable
from mismatch_probe.config import CompareConfig
from mismatch_probe.config.commands import CompareSettings
from mismatch_probe.errors import EXIT_ERROR, EXIT_LIMIT, EXIT_OK

if TYPE_CHECKING:
    from mismatch_probe.probes.comparison import RunResult
    from mismatch_probe.probes.planning import Plan


@settings_command(
    CompareSettings,
    epilog="Exit codes: 0 done and within limits, 1 error or a pass failed, 2 usage, 3 limit exceeded, "
    "130 interrupted.",
)
@out_option("runs/MODEL-TIME")
@resume_option
@click.option("--plan", "plan_only", is_flag=True, help="Print passes, tokens, memory, disk and time, and run nothing.")
@json_option
def command(values: dict[str, Any], out: str | None, resume: str | None, plan_only: bool, as_json: bool) -> int:
    """How large is the mismatch, per dtype pair?

    Samples from the prompts in every rollout dtype (with vLLM), scores all the responses in every trainer dtype (with
    the Hugging Face forward), and compares the log-probs of the very same tokens.

    \b
    Examples:
      mismatch-probe compare
      mismatch-probe compare --model ./my-checkpoint --rollout-dtypes bf16,fp16 --fail-on 'kl_k3>0.001@bf16'
      mismatch-probe compare --sequences shared --exact-kl 512 --reference float64
      mismatch-probe compare --from my-rollouts.jsonl --model ./my-checkpoint
      mismatch-probe compare --resume runs/smollm2-135m-20260101-120000
    """
    if resume is not None:
        only_new({}, {"out": out, "plan_only": plan_only}, "--resume")
    if plan_only:
        plan = mismatch_probe.plan(**CompareSettings.of(values).part(CompareConfig).model_dump())
        _show_plan(plan, out, as_json)
        return EXIT_OK
    from mismatch_probe.cli.progress import shown_progress

    with shown_progress() as progress:
        if resume is not None:
            run = mismatch_probe.Run.open(resume).resume(progress=progress, **values)
        else:
            run = mismatch_probe.compare(out=out, progress=progress, **values)
    return show_result(run.result, as_json)


def show_result(result: RunResult, as_json: bool) -> int:
    """Prints a result, says where its files are, and returns the exit code."""
    from rich.console import Console

    from mismatch_probe.report.compare import compare_report
    from mismatch_probe.report.render.terminal import print_report

    if as_json:
        print_json(result.summary.content())
    else:
        print_report(compare_report(result.data), Console())
    click.echo(f"Report: {result.path / 'report.html'}", err=True)
    if not result.complete:
        click.echo(
            f"Some passes did not finish. Run them again: mismatch-probe compare --resume {result.path}", err=True
        )
        return EXIT_ERROR
    return EXIT_LIMIT if result.exceeded else EXIT_OK


def _show_plan(plan: Plan, out: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from mismatch_probe.probes.planning import disk_gib, estimate, plan_preflight
    from mismatch_probe.report.preflight import preflight_note

    findings = plan_preflight(plan, out)
    if not as_json:
        for finding in findings:
            click.echo(printable(preflight_note(finding).text))
    rows = estimate(plan)
    total = sum(row.seconds for row in rows)
    if as_json:
        document = {
            "device": plan.device,
            "sizes": asdict(plan.sizes),
            "passes": [{**asdict(row), "pass_id": str(row.pass_id)} for row in rows],
        }
        document["findings"] = [finding.model_dump(mode="json") for finding in findings]
        print_json({**document, "seconds": total, "disk_gib": disk_gib(plan, rows)})
        return
    sizes = plan.sizes
    if plan.recorded is not None:
        click.echo(f"{len(plan.recorded)} recorded sequences of {sizes.num_prompts} prompts, on {plan.device}")
    else:
        click.echo(
            f"{plan.config.model} on {plan.device}: {sizes.num_prompts} prompts × {sizes.samples_per_prompt} responses "
            f"of at most {sizes.max_tokens} tokens per rollout dtype"
        )
    click.echo(f"{'pass':<28}{'tokens':>12}{'memory':>18}{'time, roughly':>16}")
    for row in rows:
        memory = "share of the card" if row.memory_gib is None else f"{row.memory_gib:.1f} GiB"
        click.echo(f"{row.pass_id!s:<28}{row.tokens:>12,}{memory:>18}{duration(row.seconds):>16}")
    click.echo(f"{'all':<28}{'':>12}{f'{1024 * disk_gib(plan, rows):.1f} MiB on disk':>18}{duration(total):>16}")
    click.echo("Lengths are estimated from characters and speed from the device: expect errors of a factor of 2 to 3.")


def duration(seconds: float) -> str:
    """In the unit that a reader would choose."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
