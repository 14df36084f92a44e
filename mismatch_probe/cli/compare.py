"""`mismatch-probe compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import mismatch_probe
from mismatch_probe.cli.output import print_json
from mismatch_probe.config import CompareConfig
from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import EXIT_ERROR, EXIT_LIMIT, EXIT_OK, UsageError
from mismatch_probe.types import DTYPES

if TYPE_CHECKING:
    from mismatch_probe.probes.planning import Plan
    from mismatch_probe.probes.session import RunResult

fail_on_option = click.option(
    "--fail-on",
    multiple=True,
    metavar="LIMIT",
    help="Exit 3 when metric>value (or metric<value), with an optional @rollout/trainer; repeatable.",
)
predict_length_option = click.option(
    "--predict-length",
    "predict_lengths",
    multiple=True,
    type=int,
    metavar="TOKENS",
    help="Predict ESS and sequence KL at this response length; repeatable.  [default: 2, 4, 8 times what was observed]",
)
extrapolate_option = click.option(
    "--extrapolate", is_flag=True, default=None, help="Predict beyond 8 times the observed length, too."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; all else on stderr.")


class NameList(click.ParamType[tuple[str, ...]]):
    """A comma-separated list out of a fixed set."""

    name = "list"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(SHORT_DTYPES.get(part.strip(), part.strip()) for part in value.split(","))
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is not one of {', '.join(self._known)}.", param, ctx)
        return names

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "LIST"


class _Positions(click.ParamType[int | str]):
    """A number of positions, or `all`."""

    name = "positions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all":
            return "all"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor all.", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N|all"


@click.command(
    epilog="Exit codes: 0 done and within limits, 1 error or a pass failed, 2 usage, 3 limit exceeded, 130 interrupted."
)
@click.option("--model", help="Built-in name, checkpoint folder, or hub id.  [default: smollm2-135m]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Let the checkpoint run its own Python code.")
@click.option("--prompts", type=click.Path(), help="Prompt file, .jsonl or .txt.  [default: built-in set]")
@click.option("--chat", is_flag=True, default=None, help="Render plain prompts through the model's chat template.")
@click.option("--num-prompts", type=int, help="How many prompts.  [default: 64, or the whole file]")
@click.option("--samples-per-prompt", type=int, help="Responses per prompt.  [default: by device]")
@click.option("--max-tokens", type=int, help="Longest response.  [default: by device]")
@click.option("--temperature", type=float, help="Sampling temperature, applied on both sides.  [default: 1]")
@click.option("--seed", type=int, help="Seeds every request.  [default: 0]")
@click.option(
    "--from",
    "source",
    type=click.Path(),
    metavar="SOURCE",
    help="Recorded sequences (.jsonl or .parquet), or a finished run, instead of samples.",
)
@click.option("--rescore", is_flag=True, default=None, help="With --from: score even where trainer log-probs are.")
@click.option("--replay", is_flag=True, default=None, help="With --from: decode them again in every rollout dtype.")
@click.option(
    "--sequences",
    type=click.Choice(["own", "shared"]),
    help="own: every rollout dtype samples; shared: the first does, the others decode its ids.  [default: own]",
)
@click.option(
    "--exact-kl",
    type=_Positions(),
    help="Positions per rollout pass at which full rows of logits are compared, or all.  [default: 0]",
)
@click.option(
    "--reference",
    type=click.Choice(["float32", "float64"]),
    help="What errors are charged against: the trainer's float32 column, or a float64 pass.  [default: float32]",
)
@predict_length_option
@extrapolate_option
@click.option("--rollout-dtypes", type=NameList(DTYPES), help="Rows of the matrix.  [default: all three]")
@click.option("--trainer-dtypes", type=NameList(DTYPES), help="Columns of the matrix.  [default: all three]")
@click.option(
    "--trainer-mode",
    "trainer_modes",
    type=NameList(("cast", "autocast")),
    help="cast, autocast or both.  [default: cast]",
)
@click.option("--trainer-layout", type=click.Choice(["single", "padded", "packed"]), help="[default: padded]")
@click.option(
    "--trainer-attn",
    help="Attention of transformers: sdpa, eager, flash_attention_2, …  [default: the model's own]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]")
@click.option("--eager", is_flag=True, default=None, help="No CUDA graphs and no compilation in the rollout engine.")
@click.option("--rollout-batch", type=int, help="Requests in the rollout engine at once.  [default: by device]")
@click.option(
    "--self-noise-tokens",
    type=int,
    help="Tokens produced twice to show the engines' own noise; 0: none.  [default: by device]",
)
@click.option(
    "--memory-budget",
    "memory_budget_gib",
    type=float,
    metavar="GIB",
    help="Trainer memory above the weights.  [default: by device]",
)
@click.option(
    "--engine-arg", "engine_args", multiple=True, metavar="K=V", help="Passed to vLLM and recorded; repeatable."
)
@click.option("--out", type=click.Path(), help="New folder for the run.  [default: runs/MODEL-TIME]")
@click.option("--resume", type=click.Path(), metavar="RUN", help="Continue this run; finished passes are kept.")
@click.option("--plan", "plan_only", is_flag=True, help="Print passes, tokens, memory, disk and time, and run nothing.")
@fail_on_option
@json_option
def command(
    out: str | None,
    resume: str | None,
    plan_only: bool,
    fail_on: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """How large is the mismatch, per dtype pair?

    Samples from the prompts with vLLM in every rollout dtype, scores all the responses with the Hugging Face forward in
    every trainer dtype, and compares the log-probs of the very same tokens.

    \b
    Examples:
      mismatch-probe compare
      mismatch-probe compare --model ./my-checkpoint --rollout-dtypes bf16,fp16 --fail-on 'kl_k3>0.001@bf16'
      mismatch-probe compare --sequences shared --exact-kl 512 --reference float64
      mismatch-probe compare --from my-rollouts.jsonl --model ./my-checkpoint
      mismatch-probe compare --resume runs/smollm2-135m-20260101-120000
    """
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if resume is not None and (plan_only or out is not None):
        raise UsageError(f"{'--plan' if plan_only else '--out'} cannot be combined with --resume.", "Leave it out.")
    if plan_only:
        _show_plan(mismatch_probe.plan(CompareConfig(**given)), as_json)
        return EXIT_OK
    from mismatch_probe.cli.progress import shown_progress

    with shown_progress() as progress:
        if resume is not None:
            result = mismatch_probe.resume(resume, fail_on=fail_on, progress=progress, **given)
        else:
            result = mismatch_probe.compare(CompareConfig(**given), out=out, fail_on=fail_on, progress=progress)
    return show_result(result, as_json)


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


def _show_plan(plan: Plan, as_json: bool) -> None:
    from dataclasses import asdict

    from mismatch_probe.probes.planning import disk_gib, estimate

    rows = estimate(plan)
    total = sum(row.seconds for row in rows)
    if as_json:
        document = {
            "device": plan.device,
            "sizes": asdict(plan.sizes),
            "passes": [{**asdict(row), "pass_id": str(row.pass_id)} for row in rows],
        }
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


# What makes a run in which every rollout dtype samples for itself.
_RUN = (
    "model",
    "revision",
    "trust_remote_code",
    "prompts",
    "chat",
    "num_prompts",
    "samples_per_prompt",
    "max_tokens",
    "temperature",
    "seed",
    "rollout_dtypes",
    "trainer_dtypes",
    "trainer_modes",
    "trainer_attn",
    "device",
    "memory_budget_gib",
    "out",
)


def run_parameters(*others: str) -> list[click.Parameter]:
    """The options of this command that make a run, for commands that begin with one; and `others`, by name."""
    return [parameter for parameter in command.params if parameter.name in (*_RUN, *others)]
