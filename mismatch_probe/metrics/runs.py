"""Runs of an RL sweep by arm, and what the runs of one arm have in common. The seed is the unit.

A run that diverged has no reward. Leaving such runs out would favour the arm that lost its worst ones, so they count as
the worst reward that the task can give, and every result says how many there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.inference import Floats, Inference
from mismatch_probe.metrics.intervals import join_why
from mismatch_probe.types import MetricValue

# Equal values differ by rounding up to this share of them.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        seed: Unique within its arm.
        reward: Final reward, or any other outcome of which more is better; None where the run diverged.
        collapsed: Whether it collapsed or diverged.
    """

    seed: int
    reward: float | None
    collapsed: bool

    def __post_init__(self) -> None:
        if self.reward is None and not self.collapsed:
            raise UsageError(
                f"The run with seed {self.seed} has no reward, yet did not collapse.",
                "Leave out runs that did not end; a run that diverged has collapsed=True.",
            )
        if self.reward is not None and not math.isfinite(self.reward):
            raise UsageError(
                f"The run with seed {self.seed} has the reward {self.reward}.",
                "Give a finite reward, or none and collapsed=True where the run diverged.",
            )


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        seeds = [run.seed for run in self.runs]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            raise UsageError(f"The arm {self.name} has the seed {twice[0]} twice.", "Give each run its own seed.")

    @property
    def n_collapsed(self) -> int:
        return sum(bool(run.collapsed) for run in self.runs)

    def rewards(self, worst: float) -> dict[int, float]:
        """Reward by seed, in the order of seeds; `worst` for runs that diverged.

        Raises:
            UsageError: A run has less than the worst reward.
        """
        runs = sorted(self.runs, key=lambda run: run.seed)
        rewards = {run.seed: worst if run.reward is None else float(run.reward) for run in runs}
        if rewards and min(rewards.values()) < worst:
            raise UsageError(
                f"The arm {self.name} has the reward {min(rewards.values()):g}, below the worst, {worst:g}.",
                "Give the lowest reward of the task as worst.",
            )
        return rewards


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds.

    Attributes:
        name: The arm's.
        n_runs: Runs, one per seed.
        n_collapsed: Those that collapsed or diverged.
        n_diverged: Those without a reward, which count as the worst.
        reward: Mean over runs with its 95 % t interval.
        collapse_share: Share of runs that collapsed, with its 95 % interval (Clopper and Pearson 1934).
    """

    name: str
    n_runs: int
    n_collapsed: int
    n_diverged: int
    reward: MetricValue
    collapse_share: MetricValue


def mean_over_runs(values: ArrayLike) -> MetricValue:
    """Mean of one value per run, `[n]`, with its 95 % t interval; it has none below 2 runs or where all are equal."""
    given = np.asarray(values, dtype=np.float64)
    if not len(given):
        return MetricValue(None, why="no runs")
    mean = float(given.mean())
    if len(given) < 2:
        return MetricValue(mean, why="no interval: fewer than 2 runs")
    spread = spread_of(given)
    if spread == 0:
        return MetricValue(mean, why="no interval: all values are equal")
    return MetricValue(mean, *Inference(mean, spread / math.sqrt(len(given)), len(given) - 1.0, len(given)).limits)


def share_of_runs(hits: int, n_runs: int) -> MetricValue:
    """Share of runs with a property and its 95 % interval (Clopper and Pearson 1934); runs are independent."""
    if not n_runs:
        return MetricValue(None, why="no runs")
    interval = stats.binomtest(hits, n_runs).proportion_ci(method="exact")
    return MetricValue(hits / n_runs, float(interval.low), float(interval.high))


def summarise_arm(arm: Arm, *, worst: float = 0.0) -> ArmSummary:
    """Mean reward and share of collapses of an arm. `worst` and errors as for `compare_sweep`."""
    n_diverged = sum(run.reward is None for run in arm.runs)
    reward = mean_over_runs(list(arm.rewards(worst).values()))
    if n_diverged:
        reward = replace(reward, why=join_why(f"diverged runs that count as {worst:g}: {n_diverged}", reward.why))
    share = share_of_runs(arm.n_collapsed, len(arm.runs))
    return ArmSummary(arm.name, len(arm.runs), arm.n_collapsed, n_diverged, reward, share)


def spread_of(values: Floats) -> float:
    """Standard deviation of at least 2 values; exactly 0 where they differ by rounding alone."""
    return 0.0 if np.ptp(values) <= _ROUNDING * np.abs(values).max() else float(values.std(ddof=1))
