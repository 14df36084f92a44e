"""A sweep from plan to page. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mismatch_probe.engines import devices
from mismatch_probe.errors import EXIT_ERROR, EXIT_LIMIT, EXIT_OK
from mismatch_probe.files import atomic_path, locked, write_json, write_text
from mismatch_probe.metrics.arms import ArmComparison, compare_sweep
from mismatch_probe.metrics.dose import DosedArm, DoseResponse, dose_response
from mismatch_probe.metrics.runs import Arm, Run, mean_over_runs, summarise_arm
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import default_folder
from mismatch_probe.report.rl_data import ArmPoint, Place
from mismatch_probe.report.words.rl import collapse_rule
from mismatch_probe.rl.arms import runs_table, steps_table
from mismatch_probe.rl.plan import Cell, families, labels
from mismatch_probe.rl.reading import notes, reading
from mismatch_probe.rl.run import provenance_of, resolve_model, same_model
from mismatch_probe.rl.sweep import Sweep, SweepDirectory, slots
from mismatch_probe.tables import SCHEMA_VERSION, refuse_occupied
from mismatch_probe.types import MetricValue

# Arms got the same dose where the larger ESS is at most so much larger.
SAME_ESS = 0.05
ENDED = ("complete", "collapsed", "diverged")


@dataclass(frozen=True)
class SweepResult:
    """A sweep, as far as it has gone.

    Attributes:
        path: Its folder.
        summary: Content of `summary.json`.
        arms: Runs that differ in their seed alone, in the plan's order.
        figures: By name.
        failures: Why cells could not be run, by name.
    """

    path: Path
    summary: dict[str, Any]
    arms: list[ArmPoint]
    figures: dict[str, Path]
    failures: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """An error where cells failed; the limit's code where a run without injected stress collapsed or diverged,
        since stress is there to make runs collapse.
        """
        if self.failures:
            return EXIT_ERROR
        lost = any(arm.structure == "none" and arm.n_collapsed + arm.n_diverged for arm in self.arms)
        return EXIT_LIMIT if lost else EXIT_OK

    def runs(self) -> pd.DataFrame:
        """A row per run, see `rl.arms.runs_table`."""
        return pd.read_parquet(self.path / "runs.parquet")


def new_sweep(
    cells: Sequence[Cell], out: str | Path | None, workers: int | None, progress: Progress | None, kind: str = "sweep"
) -> SweepResult:
    """Makes a folder and runs all cells.

    Raises:
        ProbeError: The model, the device or the folder cannot be had; nothing finished is lost.
    """
    progress = progress or Progress()
    first = cells[0].config
    model, device = resolve_model(first, progress), devices.choose_device(first.device)
    path = Path(out) if out is not None else default_folder(f"rl-{kind}-{Path(first.model).name}")
    at = slots(device, workers)
    refuse_occupied(path)
    with locked(path):
        directory = SweepDirectory.create(
            path,
            cells,
            {"tool_version": version("mismatch-probe"), **provenance_of(model, device).model_dump(mode="json")},
        )
        Sweep(directory, model, device, at, progress).run()
        return write_sweep(directory)


def resume_sweep(path: Path, workers: int | None, progress: Progress | None) -> SweepResult:
    """Goes on with the cells that have not ended.

    Raises:
        TableError: The folder is none of a sweep, or the model has changed.
    """
    progress = progress or Progress()
    SweepDirectory.open(path)  # before the lock, which would make the folder
    with locked(path):
        directory = SweepDirectory.open(path)
        first = directory.cells[0].config
        model, device = (
            same_model(first, directory.manifest["model"]["files"], progress),
            devices.choose_device(first.device),
        )
        Sweep(directory, model, device, slots(device, workers), progress).run()
        return write_sweep(directory)


def write_sweep(directory: SweepDirectory, places: Sequence[Place] = ()) -> SweepResult:
    """Tables, statistics, figures and page of a sweep, from what its runs have written."""
    from mismatch_probe.report.figures import save
    from mismatch_probe.report.figures.rl import curves_figure, dose_figure, equal_ess_figure
    from mismatch_probe.report.rl_page import render_sweep

    runs, steps = runs_table(directory), steps_table(directory)
    failed = runs[runs["status"] == "failed"]
    failures = dict(zip(failed["cell"], failed["why"], strict=True))
    for name, table in (("runs", runs), ("steps", steps)):
        with atomic_path(directory.path / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
    arms = arm_points(directory.cells, runs)
    comparisons = against_reference(directory.cells, runs)
    response = dose_of(directory.cells, runs)
    config = directory.cells[0].config
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": config.model, "revision": directory.manifest["model"]["revision"]},
        "task": config.task,
        "window": config.pass_window,
        "sequences": config.prompts_per_step * config.samples_per_prompt,
        "arms": [_arm_row(arm) for arm in arms],
        "comparisons": [row.as_dict() for row in comparisons],
        "dose_response": None if response is None else response.as_dict(),
        "reading": reading(arms, comparisons, config, response, places),
        "notes": [*notes(arms), *(f"{name} failed: {why}" for name, why in failures.items())],
        "provenance": _provenance(directory),
    }
    write_json(directory.path / "summary.json", summary)
    folder = directory.path / "figures"
    drawn = {"dose": dose_figure(arms, places), "curves": curves_figure(steps, arms)}
    if response is not None and response.matched:
        drawn["equal_ess"] = equal_ess_figure([pair.comparison for pair in response.matched])
    figures = {name: save(figure, folder / f"{name}.png") for name, figure in drawn.items()}
    write_text(directory.path / "report.html", render_sweep(summary, arms, places, figures))
    return SweepResult(directory.path, summary, arms, figures, failures)


def arm_points(cells: Sequence[Cell], runs: pd.DataFrame) -> list[ArmPoint]:
    """Arms with means over the seeds of the runs that have ended."""
    firsts = _firsts(cells)
    configs = [cell.config for cell in firsts]
    found = []
    for cell, label, family in zip(firsts, labels(configs), families(configs), strict=True):
        rows = runs[(runs["arm"] == cell.arm) & runs["status"].isin(ENDED)]
        config = cell.config
        alike = config.rollout_dtype == config.trainer_dtype and config.stress == "none"
        summary = summarise_arm(_arm(label, rows))
        found.append(
            ArmPoint(
                arm=cell.arm,
                label=label,
                family=family,
                precision=config.rollout_dtype if alike else "",
                structure=config.stress,
                dose=config.dose,
                n_runs=len(rows),
                n_collapsed=int((rows["status"] == "collapsed").sum()),
                n_diverged=int((rows["status"] == "diverged").sum()),
                ess_seq=_mean(rows, "ess_seq"),
                mean_abs=_mean(rows, "mean_abs_logprob_diff"),
                reward=summary.reward,
                clean_reward=_mean(rows, "clean_reward", lost=0.0),
                reward_kept=_mean(rows, "reward_kept", lost=0.0),
            )
        )
    return found


def _mean(rows: pd.DataFrame, column: str, lost: float | None = None) -> MetricValue:
    """Over runs; `lost` is what those that diverged count as."""
    values = rows[column].to_numpy(float).copy()
    if lost is not None:
        values[(rows["status"] == "diverged").to_numpy()] = lost
    return mean_over_runs(values[np.isfinite(values)])


def _arm(label: str, rows: pd.DataFrame) -> Arm:
    """What a run that diverged, or ended within its first window, gained is no reward."""
    rewards = rows["final_reward"].to_numpy(float)
    runs = []
    for seed, status, reward in zip(rows["seed"].tolist(), rows["status"].tolist(), rewards, strict=True):
        kept = status != "diverged" and bool(np.isfinite(reward))
        if kept or status != "complete":
            runs.append(Run(int(seed), float(reward) if kept else None, status != "complete"))
    return Arm(label, tuple(runs))


def against_reference(cells: Sequence[Cell], runs: pd.DataFrame) -> list[ArmComparison]:
    """Every arm against its reference: of equal algorithm and learning rate FP32 on both sides without stress, or what
    comes closest to that in the plan's order. References are compared with the first one.
    """
    firsts = _firsts(cells)
    named = dict(zip([cell.arm for cell in firsts], labels([cell.config for cell in firsts]), strict=True))
    ended = runs[runs["status"].isin(ENDED)]
    arms = {arm: _arm(label, ended[ended["arm"] == arm]) for arm, label in named.items()}
    head = _reference(firsts)
    pairs = []
    for cell in firsts:
        own = _reference([c for c in firsts if _family(c) == _family(cell)])
        other = head if own.arm == cell.arm else own
        if other.arm != cell.arm and arms[cell.arm].runs and arms[other.arm].runs:
            pairs.append((arms[cell.arm], arms[other.arm]))
    return compare_sweep(pairs)


def dose_of(cells: Sequence[Cell], runs: pd.DataFrame) -> DoseResponse | None:
    """How the final reward follows the measured dose, among the arms that have algorithm and learning rate of the first
    stressed one; None in a sweep without injected stress.
    """
    firsts = _firsts(cells)
    stressed = [cell for cell in firsts if cell.config.stress != "none"]
    if not stressed:
        return None
    measured = runs[runs["status"].isin(ENDED) & runs["ess_seq"].notna() & runs["mean_abs_logprob_diff"].notna()]
    found = []
    for cell, label in zip(firsts, labels([cell.config for cell in firsts]), strict=True):
        if _family(cell) != _family(stressed[0]):
            continue
        rows = measured[measured["arm"] == cell.arm]
        arm = _arm(label, rows)
        rows = rows.set_index("seed").loc[[run.seed for run in arm.runs]]
        if len(rows):
            structure = "precision" if cell.config.stress == "none" else cell.config.stress
            # Means of shares can exceed 1 by rounding.
            ess = tuple(min(1.0, float(value)) for value in rows["ess_seq"])
            found.append(DosedArm(arm, structure, ess, tuple(map(float, rows["mean_abs_logprob_diff"]))))
    return dose_response(found, tolerance=SAME_ESS)


def _firsts(cells: Sequence[Cell]) -> list[Cell]:
    """A cell of each arm, in the plan's order."""
    return list({cell.arm: cell for cell in cells}.values())


def _family(cell: Cell) -> tuple[str, float]:
    return cell.config.algorithm, cell.config.learning_rate


def _reference(cells: Sequence[Cell]) -> Cell:
    plain = [c for c in cells if c.config.stress == "none"]
    exact = [c for c in plain if c.config.rollout_dtype == c.config.trainer_dtype == "float32"]
    return (exact or plain or list(cells))[0]


def _arm_row(arm: ArmPoint) -> dict[str, Any]:
    return {name: v.as_dict() if isinstance(v, MetricValue) else v for name, v in vars(arm).items()}


def _provenance(directory: SweepDirectory) -> dict[str, str]:
    manifest, config = directory.manifest, directory.cells[0].config
    machine = manifest["environment"]["machine"]
    versions = manifest["environment"]["versions"]
    return {
        "cells": f"{len(directory.cells)}, {config.steps} steps each",
        "a step": f"{config.prompts_per_step} prompts × {config.samples_per_prompt} responses of at most "
        f"{config.max_tokens} tokens, {config.updates_per_rollout} updates",
        "collapse": collapse_rule(config.collapse_window),
        "device": str(manifest["device"]),
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items() if value),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "begun": str(manifest["created"]),
    }
