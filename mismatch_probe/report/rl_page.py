"""A sweep as one HTML file, under the same policy as every report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from mismatch_probe.report.format import interval, number, visible
from mismatch_probe.report.html import embedded, render_page
from mismatch_probe.report.rl_data import STRESS_NOTE
from mismatch_probe.report.sections import Section
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from mismatch_probe.report.rl_data import ArmPoint, Place
    from mismatch_probe.types import MetricValue

GUIDES: dict[str, tuple[str, str]] = {
    "dose": (
        "Reward and stability against the measured dose",
        "Each marker is an arm at its measured mismatch; filled is the sampled policy, hollow the clean weights.",
    ),
    "equal_ess": (
        "Equal ESS, different structure",
        "Where the arm of higher ESS ends lower, ESS alone does not decide what becomes of a run.",
    ),
    "curves": (
        "Training, arm by arm",
        "On the left what is learnt, on the right the mismatch meanwhile, which can also rise because a run collapses.",
    ),
}
"""Title and one-sentence reading guide of each figure, in the order of the page."""


def render_sweep(
    summary: Mapping[str, Any], arms: Sequence[ArmPoint], places: Sequence[Place], figures: Mapping[str, Path]
) -> str:
    """A self-contained page.

    Args:
        summary: Content of the sweep's `summary.json`.
        arms: Its arms.
        places: Models placed among them.
        figures: PNG files by the names of `GUIDES`.
    """
    found = [_comparisons(summary), _places(places), _provenance(summary)]
    return render_page(
        "rl.html.j2",
        model=visible(summary["model"]["name"]),
        task=visible(summary["task"]),
        window=summary["window"],
        sequences=summary["sequences"],
        reading=[visible(text) for text in summary["reading"]],
        notes=[visible(text) for text in summary["notes"]],
        arms=arms_table(arms),
        figures=embedded(figures, GUIDES),
        sections=[section for section in found if section.table.rows],
    )


def arms_table(arms: Sequence[ArmPoint]) -> Table:
    """A row per arm."""
    header = ("arm", "runs", "ESS / n", "mean |d|", "final reward", "clean reward", "kept of the best", "lost")
    rows = []
    for arm in arms:
        name = stacked(visible(arm.label), STRESS_NOTE if arm.structure != "none" else "")
        values = (arm.ess_seq, arm.mean_abs, arm.reward, arm.clean_reward, arm.reward_kept)
        lost = arm.n_collapsed + arm.n_diverged
        rows.append((name, str(arm.n_runs), *map(_cell, values), f"{lost} of {arm.n_runs}"))
    return Table(header, tuple(rows))


def _cell(value: MetricValue) -> str:
    return stacked(number(value.value), interval(value.ci_low, value.ci_high))


def _comparisons(summary: Mapping[str, Any]) -> Section:
    rows = tuple(
        (
            visible(f"{row['first']} against {row['second']}"),
            str(row["n_pairs"]),
            stacked(
                number(row["difference"]["value"]), interval(row["difference"]["ci_low"], row["difference"]["ci_high"])
            ),
            number(row["reward"]["p_holm"], 2),
            number(row["reward"]["detectable"], 2),
            visible(row["verdict"]),
        )
        for row in summary["comparisons"]
    )
    text = (
        "Final rewards are paired by seed (sign-flip test, at least 8 pairs), collapses counted (Fisher); p-values are "
        "adjusted over the rows (Holm). Detectable is the smallest true difference that this many seeds would show."
    )
    header = ("arms", "pairs", "difference of final reward", "p, Holm", "detectable", "in words")
    return Section("comparisons", "Against the reference arm", text, Table(header, rows))


def _places(places: Sequence[Place]) -> Section:
    rows = tuple((visible(p.label), _cell(p.predicted_ess), _cell(p.ess_seq), _cell(p.mean_abs)) for p in places)
    text = (
        "Where comparisons put other models: ESS as predicted at the planned length and as a step's sequences would "
        "show it, mean |d| as measured."
    )
    header = ("model", "predicted ESS / n", "of a step's sequences", "mean |d|")
    return Section("places", "Placed models", text, Table(header, rows))


def _provenance(summary: Mapping[str, Any]) -> Section:
    rows = tuple((visible(name), visible(value)) for name, value in summary["provenance"].items())
    return Section("provenance", "Provenance", "What was run.", Table(("what", "value"), rows))


def print_arms(arms: Sequence[ArmPoint], console: Console) -> None:
    """The arms on a terminal of 80 columns, without intervals."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("arm")
    for name in ("ESS/n", "mean |d|", "reward", "clean", "kept", "lost"):
        shown.add_column(name, justify="right", no_wrap=True)
    for arm in arms:
        values = (arm.ess_seq, arm.mean_abs, arm.reward, arm.clean_reward, arm.reward_kept)
        numbers = [number(value.value) for value in values]
        lost = f"{arm.n_collapsed + arm.n_diverged} of {arm.n_runs}"
        shown.add_row(Text(visible(arm.label)), *numbers, lost)
    console.print(shown)
