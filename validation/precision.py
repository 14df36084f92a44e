"""Does rounding alone harm an RL run? The protocol is data/rl/precision.toml, written before its first run.

`python -m validation.precision block SEED OUT` trains every arm with one seed (a block) and keeps its tables in
data/results/precision, so that an early stop leaves whole blocks. OUT is the folder of its sweep; one that has begun
goes on. `python -m validation.precision outcome` prints what the blocks that are done show, `… order` whether the
mismatch goes before reward, entropy and gradient norm, or after them, and `… figure OUT` draws the runs. With
`--plan precision-exploratory` they are about the arms of data/rl/precision-exploratory.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import click
import numpy as np
import pandas as pd

import mismatch_probe
from mismatch_probe.errors import UsageError
from mismatch_probe.files import atomic_path
from mismatch_probe.metrics.arms import Arm, ArmComparison, ArmTest, Run, compare_sweep, mean_over_runs
from mismatch_probe.metrics.leads import leads
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.figures.rl import draw_curves
from mismatch_probe.report.figures.style import DPI
from mismatch_probe.report.format import NONE, number
from mismatch_probe.report.model import in_line
from mismatch_probe.rl.plan import PlannedRun, labels, read_plan
from mismatch_probe.rl.records import RlDirectory, checkpoints
from mismatch_probe.rl.sweep import new_sweep, resume_sweep
from mismatch_probe.rl.sweep_summary import arm_results
from mismatch_probe.runs.folder import SANITY_SET, SWEEP

PLANS = Path("data/rl")
RESULTS = Path("data/results")
# The plans, each named as the folder of its blocks, with the plan whose first arm the others are compared with.
PROTOCOL, EXPLORATORY = "precision", "precision-exploratory"
COMPARED_WITH = {PROTOCOL: PROTOCOL, EXPLORATORY: PROTOCOL}
# What may go before or after the mismatch, and by how many steps.
FOLLOWED = ("reward", "entropy", "grad_norm")
LAGS = range(-5, 6)
# What is asked of a run, by its column in the table of runs; each is a family of comparisons.
OUTCOMES = {"final_reward": "reward of the sampled policy", "clean_reward": "reward of the clean weights in FP32"}


def block(seed: int, plan: str = PROTOCOL) -> list[PlannedRun]:
    """Every arm of a plan with that seed."""
    found = [run for run in read_plan(PLANS / f"{plan}.toml") if run.config.seed == seed]
    if not found:
        raise click.ClickException(f"The plan has no seed {seed}.")
    return found


def tables(name: str, plan: str = PROTOCOL) -> pd.DataFrame:
    """The `runs` or `steps` of all blocks of a plan."""
    parts = [pd.read_parquet(path) for path in sorted((RESULTS / plan).glob(f"{name}-*.parquet"))]
    if not parts:
        raise click.ClickException(f"{RESULTS / plan} has no block.")
    return pd.concat(parts, ignore_index=True)


def arm_names(plan: str = PROTOCOL) -> dict[str, str]:
    """Names of a plan's arms by their labels, after the one that they are compared with."""
    reference = block(0, COMPARED_WITH[plan])[0]
    runs = [reference, *(run for run in block(0, plan) if run.arm != reference.arm)]
    return dict(zip(labels([run.config for run in runs]), (run.arm for run in runs), strict=True))


def arm_of(label: str, rows: pd.DataFrame, outcome: str) -> Arm:
    """An arm of its runs with an outcome for their reward; a run that diverged has none."""
    rows = rows.sort_values("seed")
    runs = [
        Run(int(seed), float(value) if np.isfinite(value) else None, status != "complete")
        for seed, value, status in zip(rows["seed"], rows[outcome].astype(float), rows["status"], strict=True)
    ]
    return Arm(label, tuple(runs))


def comparisons(runs: pd.DataFrame, names: Mapping[str, str], outcome: str) -> list[ArmComparison]:
    """Every other arm with the first one of `arm_names`, adjusted by Holm over these."""
    reference, *others = (arm_of(label, runs[runs["arm"] == name], outcome) for label, name in names.items())
    return compare_sweep((arm, reference) for arm in others)


@click.group()
def main() -> None:
    """The protocol's runs, and what they show."""


def of_plan(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the plan that it is about."""
    return click.option("--plan", type=click.Choice(list(COMPARED_WITH)), default=PROTOCOL)(command)


@main.command(name="block")
@click.argument("seed", type=int)
@click.argument("out", type=click.Path(path_type=Path))
@of_plan
def run_block(seed: int, out: Path, plan: str) -> None:
    """Trains every arm with SEED, and keeps the tables."""
    if SWEEP.held_by(out):
        result = resume_sweep(out, None, Progress())
    else:
        result = new_sweep(block(seed, plan), out, None, Progress())
    runs = result.data.runs
    unfinished = runs.query("status in ('failed', 'unfinished')")["run"].tolist()
    if unfinished:
        raise click.ClickException(f"{unfinished[0]} did not end, so the block is not whole. Run this again.")
    runs["clean_reward"] = [
        clean_reward(out, run) if status == "complete" else None
        for run, status in zip(runs["run"], runs["status"], strict=True)
    ]
    folder = RESULTS / plan
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("runs", runs), ("steps", result.data.steps)):
        with atomic_path(folder / f"{name}-{seed:02d}.parquet") as temporary:
            table.to_parquet(temporary, index=False)


def clean_reward(out: Path, run: str) -> float:
    """Mean reward of a run's last weights in FP32, 40 responses to each of its problems: its own evaluation takes about
    128, and differences between arms are smaller than what these can show.
    """
    folder = out / "clean" / run
    if SANITY_SET.held_by(folder):
        found = mismatch_probe.rl_sanity_set_resume(folder)
    else:
        trained = RlDirectory.open(out / "runs" / run)
        *_, last = checkpoints(trained.checkpoints)
        shared = {name: getattr(trained.config, name) for name in ("task", "seed", "max_tokens", "temperature")}
        found = mismatch_probe.rl_sanity_set(out=folder, model=str(last), rollout_dtype="fp32", **shared)
    assert found.document.outcome is not None
    return found.document.outcome.accuracy


@main.command()
@of_plan
def outcome(plan: str) -> None:
    """Prints what the blocks show, as Markdown."""
    runs, names = tables("runs", plan), arm_names(plan)
    reference = next(iter(names))
    if COMPARED_WITH[plan] != plan:
        compared = tables("runs", COMPARED_WITH[plan])
        runs = pd.concat([compared[(compared["arm"] == names[reference]) & compared["seed"].isin(runs["seed"])], runs])
    click.echo(f"Blocks: {runs['seed'].nunique()}.\n")
    click.echo(
        "| arm | ESS/n, first steps | ESS/n, whole run | mean abs d (nats) | final reward | clean reward | lost |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for label, name in names.items():
        rows = runs[runs["arm"] == name]
        columns = ("ess_seq", "ess_seq_run", "mean_abs_logprob_diff", "final_reward", "clean_reward")
        values = [in_line(mean_over_runs(rows[column].dropna())) for column in columns]
        click.echo(f"| {label} | {' | '.join(values)} | {int((rows['status'] != 'complete').sum())} of {len(rows)} |")
    for column, title in OUTCOMES.items():
        click.echo(f"\n| {title}: arm less {reference} | pairs | difference | p (Holm) | detectable | p of losses |")
        click.echo("|---|---|---|---|---|---|")
        for one in comparisons(runs, names, column):
            values = [in_line(one.difference), _p(one.reward), number(one.reward.detectable), _p(one.collapse)]
            click.echo(f"| {one.first} | {one.n_pairs} | {' | '.join(values)} |")


@main.command()
@of_plan
def order(plan: str) -> None:
    """Prints where the size of the mismatch goes with another quantity of the same run, as Markdown.

    At the lag with the smallest p; a positive one means that the mismatch goes first.
    """
    steps = tables("steps", plan)
    click.echo("| arm | log mean abs d with | lag, steps | correlation | in other runs | p, over lags |")
    click.echo("|---|---|---|---|---|---|")
    for name, rows in steps.groupby("arm", sort=False):
        for column in FOLLOWED:
            size, other = (
                rows.pivot(index="seed", columns="step", values=c) for c in ("mean_abs_logprob_diff", column)
            )
            whole = size.notna().all() & other.notna().all()  # steps that every run has reached
            try:
                with np.errstate(divide="ignore"):
                    found = leads(np.log(size.loc[:, whole]), other.loc[:, whole], LAGS)
            except UsageError as error:
                click.echo(f"| {name} | {column} | {error.what} | | | |")
                continue
            best = min(found, key=lambda lead: lead.p_value)
            values = f"{best.lag:+d} | {best.correlation:.2f} | {best.elsewhere:.2f} | {best.p_value:.2g}"
            click.echo(f"| {name} | {column} | {values} |")


@main.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@of_plan
def figure(out: Path, plan: str) -> None:
    """Draws reward and mismatch over the steps into OUT, a PNG."""
    arms = arm_results(read_plan(PLANS / f"{plan}.toml"), tables("runs", plan))
    draw_curves(tables("steps", plan), arms).savefig(out, dpi=DPI, metadata={"Software": None})


def _p(test: ArmTest) -> str:
    return NONE if test.p_holm is None else f"{test.p_holm:.2g}"


if __name__ == "__main__":
    main()
