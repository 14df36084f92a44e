"""What pages and figures of RL runs show: arms of a sweep, and where a model of the user's own lies among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from mismatch_probe.results.rl_run import RlRun
    from mismatch_probe.types import MetricValue

STRESS_NOTE = "injected stress, not precision"


@dataclass(frozen=True)
class RlRunData:
    """What report and figure of an RL run show.

    Attributes:
        folder: Of the run, as commands name it.
        run: Its document, with a summary.
        steps: A row per step.
        precision: `BF16`, or `BF16/FP32` where rollout and trainer differ.
        algorithm, task, seed, learning_rate: As configured.
        planned: Steps that the run was asked for.
        exact: FP32 on both sides.
        stressed: Stress is injected.
        recorded: Whether `rollouts.parquet` exists.
    """

    folder: str
    run: RlRun
    steps: pd.DataFrame
    precision: str
    algorithm: str
    task: str
    seed: int
    learning_rate: float
    planned: int
    exact: bool
    stressed: bool
    recorded: bool


@dataclass(frozen=True)
class ArmPoint:
    """Runs that differ in their seed alone.

    Attributes:
        arm: Its name, as in the table of runs.
        label: For people.
        family: The label of the same arm without stress.
        precision: Rollout dtype where no stress is injected and the trainer has the same one, else empty.
        structure: Of the injected stress, or `none`.
        dose: Its size.
        n_runs, n_collapsed, n_diverged: Runs that have ended, and how.
        ess_seq, mean_abs: Measured over the first steps.
        reward: Of the sampled policy over the last steps.
        clean_reward: Of the clean weights under FP32 at the end.
        reward_kept: Final over best reward.
    """

    arm: str
    label: str
    family: str
    precision: str
    structure: str
    dose: float
    n_runs: int
    n_collapsed: int
    n_diverged: int
    ess_seq: MetricValue
    mean_abs: MetricValue
    reward: MetricValue
    clean_reward: MetricValue
    reward_kept: MetricValue


@dataclass(frozen=True)
class Place:
    """A compared model at a response length.

    Attributes:
        label: Model, precision and length.
        dtype: Of both sides.
        predicted_ess: Of the policy, at that length.
        ess_seq: What the sequences of one step of the sweep would show of it, the quantity of `ArmPoint`.
        mean_abs: Measured in the comparison.
    """

    label: str
    dtype: str
    predicted_ess: MetricValue
    ess_seq: MetricValue
    mean_abs: MetricValue
