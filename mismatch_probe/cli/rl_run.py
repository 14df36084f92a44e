"""`mismatch-probe rl run`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import json_option
from mismatch_probe.cli.output import print_json, show_result
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.errors import UsageError


@click.command(
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 the run collapsed or diverged, 130 interrupted (--resume goes on)."
)
@click.option(
    "--config", "config_path", type=click.Path(), help="TOML file, or the folder of an earlier run; flags override it."
)
@click.option(
    "--model", help="Built-in name, checkpoint folder, or hub id.  [default: chain, which comes with the tool]"
)
@click.option("--task", type=click.Choice(["chain", "reasoning", "math"]), help="[default: chain]")
@click.option("--problems", type=click.Path(), help="JSONL of problem and answer; --task math needs it.")
@click.option("--rollout-dtype", help="What vLLM runs in.  [default: bfloat16]")
@click.option("--trainer-dtype", help="What the trainer computes in; master weights are FP32.  [default: bfloat16]")
@click.option("--trainer-mode", type=click.Choice(["autocast", "cast"]), help="[default: autocast]")
@click.option("--algorithm", help="See docs/algorithms.md.  [default: dr-grpo]")
@click.option("--steps", type=int, help="Rollouts.  [default: 100]")
@click.option("--learning-rate", type=float, help="[default: 1e-4]")
@click.option("--stress", help="Injected stress: weight-noise, mantissa, logit-noise, stale.  [default: none]")
@click.option("--dose", type=float, help="Its size; see `rl.stress`.")
@click.option("--seed", type=int, help="Of everything.  [default: 0]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]")
@click.option(
    "--set", "others", multiple=True, metavar="KEY=VALUE", help="Any other key of the configuration; repeatable."
)
@click.option("--out", type=click.Path(), help="New folder for the run.  [default: runs/rl-MODEL-TIME]")
@click.option("--resume", type=click.Path(), metavar="RUN", help="Go on from this run's newest checkpoint.")
@click.option("--check", is_flag=True, help="Validate the configuration, print it, and run nothing.")
@json_option
def command(
    config_path: str | None,
    others: tuple[str, ...],
    out: str | None,
    resume: str | None,
    check: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Fine-tune by RL with vLLM rollouts and a Hugging Face trainer, and measure their mismatch at every step.

    The run ends early where it collapses or diverges. Its folder holds run.json, steps.parquet, report.html and
    report.md.

    \b
    Examples:
      mismatch-probe rl run --rollout-dtype fp16 --trainer-dtype fp16 --steps 50
      mismatch-probe rl run --stress weight-noise --dose 0.2 --trainer-dtype fp32 --rollout-dtype fp32
      mismatch-probe rl run --config my-run.toml --set prompts_per_step=64
      mismatch-probe rl run --config runs/rl-chain-20260101-120000 --seed 1
      mismatch-probe rl run --resume runs/rl-chain-20260101-120000
    """
    given = {name: value for name, value in flags.items() if value is not None}
    given |= dict(_setting(text) for text in others)
    if resume is not None and (given or config_path or out or check):
        raise UsageError("Options of a new run cannot be combined with --resume.", "Use --resume alone.")
    if check:
        print_json(mismatch_probe.read_rl_config(config_path, given).model_dump(mode="json"))
        return 0
    with shown_progress("steps") as progress:
        if resume is not None:
            result = mismatch_probe.rl_resume(resume, progress=progress)
        else:
            config = mismatch_probe.read_rl_config(config_path, given)
            result = mismatch_probe.rl_run(config, out=out, progress=progress)
    return show_result(result, as_json)


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`; the value is read as TOML where it is TOML, else as text."""
    import tomllib

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--set {text!r} is not of the form key=value.", "Example: --set max_tokens=128.")
    try:
        found = tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        return name, value
    return name, found["x"] if len(found) == 1 else value
