"""What the steps of an RL run show: windows at start and end, whether it learned or collapsed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from mismatch_probe.metrics.inference import student
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.rl_run import (
    COLLAPSE_BELOW,
    COLLAPSE_ERRORS,
    Ending,
    Learning,
    RunSummary,
    SyncCheck,
    Window,
)
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.types import MetricValue

PHASES = ("rollout", "sync", "forward_backward", "other")
# Fewer steps than this on either side do not tell whether the reward changed.
MIN_STEPS = 5
# Fields of `Window` that are means of a column of that name.
_COLUMNS = tuple(set(Window.model_fields) - {"first_step", "n_steps", "truncated", "seconds"})


def summarise(steps: pd.DataFrame, config: RlConfig) -> RunSummary:
    """What finished steps show.

    Args:
        steps: A row per step, see `RlDirectory.steps`.
        config: Of the run.
    """
    n = len(steps)
    size = min(config.pass_window, max(1, n // 2))
    start, end = (steps.head(size), steps.tail(size)) if n else (None, None)
    change = _change(start, end, distinct=n >= 2 * size)
    return RunSummary(
        n_steps=n,
        start=None if start is None else _window(start),
        end=None if end is None else _window(end),
        learning=_learning(change, size),
        reward_change=change,
        sync=_sync(steps, checked=config.check_sync),
        seconds={phase: float(steps[f"seconds_{phase}"].sum()) if n else 0.0 for phase in PHASES},
        n_responses=_total(steps, "n_responses"),
        n_truncated=_total(steps, "n_truncated"),
        n_empty=_total(steps, "n_empty"),
        n_grader_killed=_total(steps, "n_grader_killed"),
        n_skipped=_total(steps, "n_skipped"),
    )


def _window(rows: pd.DataFrame) -> Window:
    seconds = sum(rows[f"seconds_{phase}"].to_numpy(float) for phase in PHASES)
    return Window(
        first_step=int(rows["step"].iloc[0]),
        n_steps=len(rows),
        truncated=_total(rows, "n_truncated") / max(1, _total(rows, "n_responses")),
        seconds=float(np.mean(seconds)),
        **{column: finite_mean(rows, column) for column in _COLUMNS},
    )


def finite_mean(rows: pd.DataFrame, column: str) -> float | None:
    """Mean of a column over the rows in which it is finite; None where there are none, or no such column."""
    values = rows[column].to_numpy(float) if column in rows else np.empty(0)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _total(rows: pd.DataFrame, column: str) -> int:
    return int(rows[column].sum()) if len(rows) else 0


def _change(start: pd.DataFrame | None, end: pd.DataFrame | None, *, distinct: bool) -> MetricValue:
    """Mean reward of the last steps less that of the first, with Welch's interval: steps differ in their draws."""
    if start is None or end is None:
        return MetricValue(None, why="no step has ended")
    first, last = start["reward"].to_numpy(float), end["reward"].to_numpy(float)
    change, n = float(last.mean() - first.mean()), len(first)
    if n < MIN_STEPS or not distinct:
        return MetricValue(change, why=f"no interval: {n} steps on either side, {MIN_STEPS} are needed")
    parts = [float(values.var(ddof=1)) / n for values in (first, last)]
    if not sum(parts):
        return MetricValue(change, why="no interval: all steps of a window have the same reward")
    degrees = sum(parts) ** 2 / sum(part**2 / (n - 1) for part in parts)
    half = student(degrees) * math.sqrt(sum(parts))
    return MetricValue(change, change - half, change + half)


def _learning(change: MetricValue, size: int) -> Learning:
    if change.value is None or size < MIN_STEPS:
        return "unknown"
    low, high = (change.value if limit is None else limit for limit in (change.ci_low, change.ci_high))
    return "rose" if low > 0 else "fell" if high < 0 else "flat"


def _sync(steps: pd.DataFrame, *, checked: bool) -> SyncCheck:
    gaps = steps["sync_gap"].to_numpy(float) if len(steps) else np.empty(0)
    if not np.isfinite(gaps).any():
        return SyncCheck(checked=checked, n_checked=0, largest_gap=None, at_step=None)
    at = int(np.nanargmax(gaps))
    return SyncCheck(
        checked=checked,
        n_checked=int(np.isfinite(gaps).sum()),
        largest_gap=float(gaps[at]),
        at_step=int(steps["step"].iloc[at]),
    )


def run_findings(config: RlConfig, ending: Ending | None, summary: RunSummary) -> tuple[Finding, ...]:
    """Statements about a run: how it ended and whether it learned, its gap, where the gap comes from, and notes."""
    found = [_outcome(config, ending, summary), _gap(summary)]
    found += [*_source(summary), *_stress(config), *_sanity(config, ending), *_healthy(ending)]
    if not config.check_sync:
        found.append(Finding(code="rl-sync-unchecked", severity="note"))
    counts = {
        "rl-updates-skipped": (summary.n_skipped, summary.n_steps * config.updates_per_rollout),
        "rl-grader-killed": (summary.n_grader_killed, summary.n_responses),
        "rl-empty-responses": (summary.n_empty, summary.n_responses),
    }
    for code, (n, total) in counts.items():
        if n:
            found.append(Finding(code=code, severity="note", values={"n": n, "total": total}))
    return tuple(found)


def _outcome(config: RlConfig, ending: Ending | None, summary: RunSummary) -> Finding:
    """The one statement on how the run ended; on its reward only where it ran to its end."""
    if ending is None:
        values: Mapping[str, Value] = {"steps": summary.n_steps, "planned": config.steps}
        return Finding(code="rl-unfinished", severity="note", values=values)
    if ending.cause is not None:
        return ending.cause
    start, end = (None if window is None else window.reward for window in (summary.start, summary.end))
    values = {
        "steps": ending.steps,
        "window": 0 if summary.end is None else summary.end.n_steps,
        "start": start,
        "end": end,
        "change": summary.reward_change,
    }
    fine = summary.learning == "rose" or ending.passed
    severity: Severity = "info" if fine else "note" if summary.learning == "unknown" else "warn"
    return Finding(code=f"rl-reward-{summary.learning}", severity=severity, values=values)


def _gap(summary: RunSummary) -> Finding:
    start, end = summary.start, summary.end
    if start is None or end is None or start.mean_abs_logprob_diff is None or end.mean_abs_logprob_diff is None:
        return Finding(code="rl-gap-unmeasured", severity="note")
    values: Mapping[str, Value] = {
        "window": end.n_steps,
        "start": start.mean_abs_logprob_diff,
        "end": end.mean_abs_logprob_diff,
        "ess_start": start.ess_seq,
        "ess_end": end.ess_seq,
    }
    return Finding(code="rl-gap", severity="info", values=values)


def _source(summary: RunSummary) -> list[Finding]:
    """Which part of the change from sampling to update is the largest, over the last steps."""
    end = summary.end
    if end is None:
        return []
    parts = {
        "mismatch": end.mean_abs_logprob_diff,
        "staleness": end.staleness_mean_abs,
        "movement": end.movement_mean_abs,
    }
    known = {name: value for name, value in parts.items() if value is not None}
    if len(known) < len(parts) or not any(known.values()):
        return []
    largest = max(known, key=lambda name: known[name])
    values: Mapping[str, Value] = {**known, "window": end.n_steps, "largest": largest}
    return [Finding(code="rl-gap-source", severity="info", values=values)]


def _stress(config: RlConfig) -> list[Finding]:
    if config.stress == "none":
        return []
    values: Mapping[str, Value] = {"structure": config.stress, "dose": config.dose}
    return [Finding(code="rl-injected-stress", severity="note", values=values)]


def _sanity(config: RlConfig, ending: Ending | None) -> list[Finding]:
    if ending is None or ending.status != "complete":
        return []
    if ending.steps < config.pass_window:
        short: Mapping[str, Value] = {"steps": ending.steps, "window": config.pass_window}
        return [Finding(code="rl-sanity-short", severity="note", values=short)]
    values: Mapping[str, Value] = {
        "window": config.pass_window,
        "above": config.pass_above,
        "first_above_step": ending.first_above_step,
    }
    code = "rl-sanity-passed" if ending.passed else "rl-sanity-missed"
    return [Finding(code=code, severity="info", values=values)]


def _healthy(ending: Ending | None) -> list[Finding]:
    if ending is None or ending.status == "complete":
        return []
    values: Mapping[str, Value] = {"checkpoint": ending.last_healthy_checkpoint}
    return [Finding(code="rl-healthy-checkpoint", severity="info", values=values)]


_SILENT_STEPS = 20


class CollapseDetector:
    """Takes the mean reward of every step, and says when a run has collapsed.

    A run has collapsed when the mean reward of its last `window` steps is below half of the best mean of `window`
    earlier steps, and the drop exceeds 6 standard errors. The windows do not overlap. The standard error is that of a
    difference of two means over steps, from the spread of the rewards between steps within each window. It is no
    smaller than what binomial rewards would have, nor than what half the mean square of the change from step to step
    gives over the whole run (von Neumann 1941), which a slow trend hardly touches: of many windows the best is good by
    luck, and the spread within a few steps small by luck. Flat rewards ended less than 0.1 % of simulated runs of 1000
    steps, with equal and with very unequal problems. A fall is such a change itself: a sudden one is seen no sooner
    than at the first step whose number exceeds 36 / window.

    The best window may lie any number of steps back. If it had to be recent, a slow collapse would be missed: a fall to
    a third over 400 steps loses less than half in any 100 of them. What speaks against it is a switch to harder
    problems, which lowers rewards in a healthy run. No run makes one: the loop goes through one set of problems, each
    round in a fresh order, so that windows differ in their problems by chance, which is in the spread between steps.

    Args:
        window: Steps of either mean.
    """

    def __init__(self, window: int = 10) -> None:
        self._window = window
        self._rewards: list[float] = []
        self._responses: list[int] = []
        self._best_end: int | None = None
        self._silent = 0
        self._said = False
        self._squared_changes = 0.0

    @property
    def last_healthy_step(self) -> int | None:
        """Last step of the best window; None before there is one."""
        return self._best_end

    def update(self, step: int, reward: float, n_responses: int, *, equal: bool | None = None) -> Finding | None:
        """Takes in a step.

        Args:
            step: Its number, counted from 0.
            reward: Mean over its responses, between 0 and 1.
            n_responses: How many there were.
            equal: Whether all rewards of the step were the same; if not given, whether they are all 0 or all 1.

        Returns:
            `rl-collapsed` ends a run; `rl-no-signal` is a note; None where there is nothing to say.
        """
        assert step == len(self._rewards)
        assert math.isfinite(reward)
        if self._rewards:
            self._squared_changes += (reward - self._rewards[-1]) ** 2
        self._rewards.append(reward)
        self._responses.append(n_responses)
        window, now = self._window, len(self._rewards)
        if now >= window:
            mean = float(np.mean(self._rewards[now - window : now]))
            if self._best_end is None or mean >= self._mean(self._best_end):
                self._best_end = now - 1
        if self._collapsed():
            assert self._best_end is not None
            values = {"step": step, "best": self._mean(self._best_end), "best_step": self._best_end}
            values |= {"present": self._mean(now - 1), "window": window}
            return Finding(code="rl-collapsed", severity="fail", values=values)
        return self._signal(step, reward in (0.0, 1.0) if equal is None else equal)

    def _signal(self, step: int, equal: bool) -> Finding | None:
        self._silent = self._silent + 1 if equal else 0
        if self._silent < _SILENT_STEPS:
            self._said = False
            return None
        if self._said:
            return None
        self._said = True
        return Finding(code="rl-no-signal", severity="note", values={"step": step, "n_steps": self._silent})

    def _mean(self, end: int) -> float:
        return float(np.mean(self._rewards[end - self._window + 1 : end + 1]))

    def _collapsed(self) -> bool:
        window, now = self._window, len(self._rewards)
        if self._best_end is None or self._best_end > now - 1 - window:
            return False
        best, present = self._mean(self._best_end), self._mean(now - 1)
        variance = sum(self._variance(end) for end in (self._best_end, now - 1))
        return present < COLLAPSE_BELOW * best and best - present > COLLAPSE_ERRORS * math.sqrt(variance)

    def _variance(self, end: int) -> float:
        """Of the mean of a window."""
        rewards = np.array(self._rewards[end - self._window + 1 : end + 1])
        n = np.array(self._responses[end - self._window + 1 : end + 1])
        mean = float(rewards.mean())
        binomial = mean * (1 - mean) / max(1, n.sum()) if 0 <= mean <= 1 else 0.0
        changes = self._squared_changes / 2 / (len(self._rewards) - 1)
        return max(float(rewards.var(ddof=1)) / self._window, changes / self._window, binomial)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "window": self._window,
            "rewards": list(self._rewards),
            "responses": list(self._responses),
            "best_end": self._best_end,
            "silent": self._silent,
            "said": self._said,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CollapseDetector:
        """Goes on where `state` was taken."""
        detector = cls(int(state["window"]))
        detector._rewards = [float(reward) for reward in state["rewards"]]
        detector._responses = [int(n) for n in state["responses"]]
        for before, after in pairwise(detector._rewards):
            detector._squared_changes += (after - before) ** 2
        detector._best_end = state["best_end"]
        detector._silent, detector._said = int(state["silent"]), bool(state["said"])
        return detector
