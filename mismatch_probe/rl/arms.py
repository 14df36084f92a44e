"""What a sweep has found: a row per run, and arms, which are runs that differ in their seed alone.

Where an arm lies on the axes of a dose–response figure is measured in its first steps, while the policy is still near
the initial one: a policy that has collapsed has a large mismatch for that reason (FACTS.md), which is not the dose.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from mismatch_probe.report.words import say
from mismatch_probe.rl.plan import Cell
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.summary import PHASES, finite_mean
from mismatch_probe.rl.sweep import SweepDirectory

# What tells arms apart, as columns of the table of runs.
AXES = ("rollout_dtype", "trainer_dtype", "trainer_mode", "algorithm", "learning_rate", "stress", "dose")
# Columns of the table of steps: what takes the rollout from the trained policy, stale weights included.
DOSES = {"ess_seq": "off_policy_ess_seq", "mean_abs_logprob_diff": "off_policy_mean_abs"}
_MEASURED = (
    *("final_reward", "best_reward", "reward_kept", "clean_reward", "first_above_step"),
    *(name for key in DOSES for name in (key, f"{key}_run")),
)


def runs_table(sweep: SweepDirectory) -> pd.DataFrame:
    """A row per cell, ended or not.

    Columns: `cell`, `arm`, `AXES`, `seed`, `status` (`complete`, `collapsed`, `diverged`, `failed`, `unfinished`),
    `why`, `steps`; `final_reward`, mean over the last window of the run's configuration; `best_reward`, of its best
    window; `reward_kept`, the ratio of both; `clean_reward`, of the clean weights at the end; `passed` and
    `first_above_step`, the sanity test; `ess_seq` and `mean_abs_logprob_diff`, means over the first window, both also
    with `_run`, over the whole run; seconds by phase. `ess_seq` is what a step's sequences show: of few of them the
    sample ESS is above the policy's.
    """
    table = pd.DataFrame([_row(cell, sweep.existing(cell), sweep.failure(cell)) for cell in sweep.cells])
    # A column in which no run has a value is one of numbers all the same.
    return table.astype(dict.fromkeys(_MEASURED, float))


def steps_table(sweep: SweepDirectory) -> pd.DataFrame:
    """The steps of all runs, each with its `cell`, `arm` and `seed`."""
    found = []
    for cell in sweep.cells:
        run = sweep.existing(cell)
        if run is not None and len(steps := run.steps()):
            found.append(steps.assign(cell=cell.name, arm=cell.arm, seed=cell.config.seed))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _row(cell: Cell, run: RlDirectory | None, failure: str) -> dict[str, Any]:
    config = cell.config
    steps = pd.DataFrame() if run is None else run.steps()
    ending = None if run is None else run.document.ending
    return {
        "cell": cell.name,
        "arm": cell.arm,
        **{axis: getattr(config, axis) for axis in AXES},
        "seed": config.seed,
        "status": ("failed" if failure else "unfinished") if ending is None else ending.status,
        "why": failure if ending is None else "" if ending.cause is None else say(ending.cause),
        "steps": len(steps),
        **_rewards(steps, config.pass_window),
        "clean_reward": None if ending is None else ending.clean_reward,
        "passed": ending is not None and ending.passed,
        "first_above_step": None if ending is None else ending.first_above_step,
        **_doses(steps, config.pass_window),
        **{f"seconds_{p}": float(steps[f"seconds_{p}"].sum()) if len(steps) else 0.0 for p in PHASES},
    }


def _rewards(steps: pd.DataFrame, window: int) -> dict[str, float | None]:
    if len(steps) < window:
        return {"final_reward": None, "best_reward": None, "reward_kept": None}
    means = steps["reward"].rolling(window).mean().dropna()
    final, best = float(means.iloc[-1]), float(means.max())
    return {"final_reward": final, "best_reward": best, "reward_kept": final / best if best > 0 else None}


def _doses(steps: pd.DataFrame, window: int) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, rows in (("", steps.head(window)), ("_run", steps)):
        found |= {f"{key}{name}": finite_mean(rows, column) for key, column in DOSES.items()}
    return found
