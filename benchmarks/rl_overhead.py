"""Where the time of an RL run's steps goes: the share outside rollout, sync, forward and backward.

Reads finished runs and sweeps, or makes a run of 20 steps on the bundled model first. Whatever the loop itself does
(rewards, advantages, metrics, tables) is `other`.

    python benchmarks/rl_overhead.py
    python benchmarks/rl_overhead.py runs/rl-demo
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import pandas as pd

import mismatch_probe

PHASES = ("rollout", "sync", "forward_backward", "other")


def report(run: Path) -> None:
    steps = pd.read_parquet(run / "steps.parquet")
    arms = steps.groupby("arm") if "arm" in steps else [("run", steps)]
    for name, rows in arms:
        seconds = rows[[f"seconds_{phase}" for phase in PHASES]].median()
        shares = ", ".join(f"{p} {100 * seconds[f'seconds_{p}'] / seconds.sum():.1f} %" for p in PHASES)
        print(f"{name}: {seconds.sum():.2f} s a step ({shares}; medians over {len(rows)} steps)")


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True), nargs=-1)
def main(runs: tuple[Path, ...]) -> None:
    for run in runs:
        report(run)
    if not runs:
        with tempfile.TemporaryDirectory() as folder:
            report(mismatch_probe.rl_run(steps=20, out=Path(folder) / "run").path)


if __name__ == "__main__":
    main()
