"""What the steps of a run show: windows at its start and end, whether it learned, and where the gap comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from mismatch_probe.metrics.inference import student
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.rl_run import Ending, Learning, RunSummary, SyncCheck, Window
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
    """Mean of a column over the rows in which it is finite; None where there are none."""
    values = rows[column].to_numpy(float) if len(rows) else np.empty(0)
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
