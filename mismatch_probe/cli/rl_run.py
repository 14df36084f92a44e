"""`mismatch-probe rl run`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option, only_new, out_option, resume_option, settings_command
from mismatch_probe.cli.output import print_json, show_result
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.rl.config import RlConfig


@settings_command(
    RlConfig,
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 the run collapsed or diverged, 130 interrupted (--resume goes on).",
)
@out_option("runs/rl-MODEL-TIME")
@resume_option
@click.option("--check", is_flag=True, help="Check the settings, print them, and run nothing.")
@json_option
def command(values: dict[str, Any], out: str | None, resume: str | None, check: bool, as_json: bool) -> int:
    """Fine-tune by RL with vLLM rollouts and a Hugging Face trainer, and measure their mismatch at every step.

    The run ends early where it collapses or diverges. Its folder holds run.json, steps.parquet, report.html and
    report.md.

    \b
    Examples:
      mismatch-probe rl run --rollout-dtype fp16 --trainer-dtype fp16 --steps 50
      mismatch-probe rl run --stress weight-noise --dose 0.2 --trainer-dtype fp32 --rollout-dtype fp32
      mismatch-probe rl run --config my-run.toml --prompts-per-step 64
      mismatch-probe rl run --config runs/rl-chain-20260101-120000 --seed 1
      mismatch-probe rl run --resume runs/rl-chain-20260101-120000
    """
    if resume is not None:
        only_new(values, {"out": out, "check": check}, "--resume")
    if check:
        print_json(RlConfig.of(values).model_dump())
        return 0
    with shown_progress("steps") as progress:
        if resume is not None:
            result = mismatch_probe.rl_resume(resume, progress=progress)
        else:
            result = mismatch_probe.rl_run(out=out, progress=progress, **values)
    return show_result(result, as_json)
