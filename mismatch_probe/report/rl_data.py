"""What reports and figures of RL runs and sweeps show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from mismatch_probe.results.rl_run import RlRun
    from mismatch_probe.results.sweep import RlSweep, SweepSummary

STRESS_NOTE = "injected stress, not precision"


@dataclass(frozen=True)
class RlRunData:
    """What report and figure of an RL run show.

    Attributes:
        folder: Of the run, as commands name it.
        model: Name of the initial model.
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
    model: str
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
class SweepData:
    """What report and figures of a sweep show.

    Attributes:
        folder: Of the sweep, as commands name it.
        model: Name of the initial model.
        sweep: Its document.
        summary: The summary in it.
        task: Of all runs.
        runs: A row per planned run.
        steps: A row per step of every run.
    """

    folder: str
    model: str
    sweep: RlSweep
    summary: SweepSummary
    task: str
    runs: pd.DataFrame
    steps: pd.DataFrame
