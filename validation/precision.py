"""Does rounding alone harm an RL run? The protocol is data/rl/precision.toml, written before its first run.

`python -m validation.precision block SEED OUT` trains every arm with one seed (a block) and keeps its tables in
data/results/precision, so that an early stop leaves whole blocks. OUT is the folder of its sweep; one that has begun
goes on. `python -m validation.precision outcome` prints what the blocks that are done show, and `… order` whether the
mismatch goes before reward, entropy and gradient norm, or after them.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pandas as pd

from mismatch_probe.errors import UsageError
from mismatch_probe.files import atomic_path
from mismatch_probe.metrics.arms import Arm, ArmComparison, ArmTest, Run, compare_sweep, mean_over_runs
from mismatch_probe.metrics.leads import leads
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.format import NONE, number
from mismatch_probe.rl.plan import PlannedRun, labels, read_plan
from mismatch_probe.rl.sweep import new_sweep, resume_sweep
from mismatch_probe.runs.folder import SWEEP
from mismatch_probe.types import MetricValue

PLAN = Path("data/rl/precision.toml")
RESULTS = Path("data/results/precision")
# The arm that the others are compared with, by its label in the plan.
REFERENCE = "BF16"
# What may go before or after the mismatch, and by how many steps.
FOLLOWED = ("reward", "entropy", "grad_norm")
LAGS = range(-5, 6)
# What is asked of a run, by its column in the table of runs; each is a family of comparisons.
OUTCOMES = {"final_reward": "reward of the sampled policy", "clean_reward": "reward of the clean weights in FP32"}


def block(seed: int) -> list[PlannedRun]:
    """Every arm of the plan with that seed."""
    found = [run for run in read_plan(PLAN) if run.config.seed == seed]
    if not found:
        raise click.ClickException(f"The plan has no seed {seed}.")
    return found


def tables(name: str) -> pd.DataFrame:
    """The `runs` or `steps` of all blocks."""
    parts = [pd.read_parquet(path) for path in sorted(RESULTS.glob(f"{name}-*.parquet"))]
    if not parts:
        raise click.ClickException(f"{RESULTS} has no block.")
    return pd.concat(parts, ignore_index=True)


def arm_names() -> dict[str, str]:
    """Names of the arms by their labels, in the order of the plan."""
    firsts = list({run.arm: run for run in read_plan(PLAN)}.values())
    return dict(zip(labels([run.config for run in firsts]), (run.arm for run in firsts), strict=True))


def arm_of(label: str, rows: pd.DataFrame, outcome: str) -> Arm:
    """An arm of its runs with an outcome for their reward; a run that diverged has none."""
    rows = rows.sort_values("seed")
    runs = [
        Run(int(seed), float(value) if np.isfinite(value) else None, status != "complete")
        for seed, value, status in zip(rows["seed"], rows[outcome].astype(float), rows["status"], strict=True)
    ]
    return Arm(label, tuple(runs))


def comparisons(runs: pd.DataFrame, outcome: str) -> list[ArmComparison]:
    """Every other arm with the reference, adjusted by Holm over these."""
    arms = {label: arm_of(label, runs[runs["arm"] == name], outcome) for label, name in arm_names().items()}
    reference = arms.pop(REFERENCE)
    return compare_sweep((arm, reference) for arm in arms.values())


@click.group()
def main() -> None:
    """The protocol's runs, and what they show."""


@main.command(name="block")
@click.argument("seed", type=int)
@click.argument("out", type=click.Path(path_type=Path))
def run_block(seed: int, out: Path) -> None:
    """Trains every arm with SEED, and keeps the tables."""
    if SWEEP.held_by(out):
        result = resume_sweep(out, None, Progress())
    else:
        result = new_sweep(block(seed), out, None, Progress())
    unfinished = result.data.runs.query("status in ('failed', 'unfinished')")["run"].tolist()
    if unfinished:
        raise click.ClickException(f"{unfinished[0]} did not end, so the block is not whole. Run this again.")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, table in (("runs", result.data.runs), ("steps", result.data.steps)):
        with atomic_path(RESULTS / f"{name}-{seed:02d}.parquet") as temporary:
            table.to_parquet(temporary, index=False)


@main.command()
def outcome() -> None:
    """Prints what the blocks show, as Markdown."""
    runs = tables("runs")
    click.echo(f"{runs['seed'].nunique()} blocks.\n")
    click.echo(
        "| arm | ESS/n, first steps | ESS/n, whole run | mean abs d (nats) | final reward | clean reward | lost |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for label, name in arm_names().items():
        rows = runs[runs["arm"] == name]
        columns = ("ess_seq", "ess_seq_run", "mean_abs_logprob_diff", "final_reward", "clean_reward")
        values = [_shown(mean_over_runs(rows[column].dropna())) for column in columns]
        click.echo(f"| {label} | {' | '.join(values)} | {int((rows['status'] != 'complete').sum())} of {len(rows)} |")
    for column, title in OUTCOMES.items():
        click.echo(f"\n| {title}: arm less {REFERENCE} | pairs | difference | p (Holm) | detectable | p of losses |")
        click.echo("|---|---|---|---|---|---|")
        for one in comparisons(runs, column):
            values = [_shown(one.difference), _p(one.reward), number(one.reward.detectable), _p(one.collapse)]
            click.echo(f"| {one.first} | {one.n_pairs} | {' | '.join(values)} |")


@main.command()
def order() -> None:
    """Prints where the size of the mismatch goes with another quantity of the same run, as Markdown.

    At the lag with the smallest p; a positive one means that the mismatch goes first.
    """
    steps = tables("steps")
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


def _shown(value: MetricValue) -> str:
    if value.ci_low is None:
        return number(value.value)
    return f"{number(value.value)} [{number(value.ci_low)}, {number(value.ci_high)}]"


def _p(test: ArmTest) -> str:
    return NONE if test.p_holm is None else f"{test.p_holm:.2g}"


if __name__ == "__main__":
    main()
