"""Figures of RL runs and sweeps: pure functions from tables to a Figure, which compute nothing but layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from mismatch_probe.report.data import STRESS_NOTE, RlRunData, SweepData
from mismatch_probe.report.figures import figure as register
from mismatch_probe.report.figures.style import Look, look, plot_settings
from mismatch_probe.report.format import visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from mismatch_probe.results.sweep import ArmResult, Place
    from mismatch_probe.types import MetricValue

_STRUCTURES = {
    "weight-noise": Look("#8c4fb0", "-", "D"),
    "mantissa": Look("#4f9a3a", "--", "v"),
    "logit-noise": Look("#b5842c", "-.", "P"),
    "stale": Look("#b03a58", ":", "X"),
}
# A remedy keeps the colour of its precision.
_REMEDIES = {"zero-mismatch": ("-.", "*"), "routing-replay": (":", "p")}
_GRID = "#e4e4e4"
_OTHER = Look("#777777", "-", "h")


def arm_look(point: ArmResult) -> Look:
    """A precision's look, in another line and marker under a remedy, or that of the injected stress."""
    if point.structure != "none":
        return _STRUCTURES[point.structure]
    mark = look(point.precision) if point.precision else _OTHER
    return Look(mark.color, *_REMEDIES[point.remedy]) if point.remedy in _REMEDIES else mark


@register(
    "run",
    of=RlRunData,
    title="Step by step",
    guide="Where the mismatch rises while the reward falls, compare which of them moves first.",
    alt="Six panels over the steps: mean reward with the reward of the clean weights as squares; mean absolute gaps of "
    "mismatch, policy movement and staleness on a log scale; effective sample size of sequences and tokens; entropy; "
    "gradient norm on a log scale; seconds of a step, stacked by phase.",
    needs=lambda data: len(data.steps) > 0,
)
def run_figure(data: RlRunData) -> Figure:
    """One run, step by step: reward, gaps, ESS, entropy, gradient norm, and time."""
    steps = data.steps
    with plot_settings():
        figure = Figure(figsize=(10.5, 5.6), layout="constrained")
        axes = figure.subplots(2, 3, sharex=True)
        x = steps["step"].to_numpy()
        _series(axes[0, 0], x, steps, {"reward": "sampled policy"}, "mean reward")
        clean = steps["clean_reward"].to_numpy(float)
        if np.isfinite(clean).any():
            axes[0, 0].plot(x, clean, "s", color="#111111", markersize=4, label="clean weights, FP32")
        gaps = {
            "mean_abs_logprob_diff": "mismatch",
            "movement_mean_abs": "policy movement",
            "staleness_mean_abs": "staleness",
        }
        _series(axes[0, 1], x, steps, gaps, "mean |Δ log-prob| (nats)", log=True)
        _series(axes[0, 2], x, steps, {"ess_seq": "sequences", "ess_token": "tokens"}, "effective sample size / n")
        _series(axes[1, 0], x, steps, {"entropy": "entropy"}, "entropy of a token (nats)")
        _series(axes[1, 1], x, steps, {"grad_norm": "gradient"}, "gradient norm before clipping", log=True)
        phases = ["rollout", "forward_backward", "sync", "other"]
        values = [steps[f"seconds_{phase}"].to_numpy(float) for phase in phases]
        grays = ("#3d3d3d", "#7d7d7d", "#b3b3b3", "#dddddd")
        names = [phase.replace("_", "/") for phase in phases]
        axes[1, 2].stackplot(x, *values, labels=names, colors=grays, linewidth=0)
        axes[1, 2].set_ylabel("seconds a step")
        for panel in axes.flat:
            panel.grid(visible=True, color=_GRID, linewidth=0.6)
            if len(panel.get_legend_handles_labels()[0]) > 1:
                panel.legend(frameon=False, fontsize=8)
        for panel in axes[1]:
            panel.set_xlabel("step")
    return figure


def _series(
    axes: Axes,
    x: np.ndarray[Any, Any],
    steps: pd.DataFrame,
    columns: Mapping[str, str],
    title: str,
    *,
    log: bool = False,
) -> None:
    """Lines of columns that differ in dash and shade; on a log scale what is not above 0 has no place."""
    styles = (("#d95f02", "-"), ("#1f5fa8", "--"), ("#111111", ":"))
    for (column, label), (color, dash) in zip(columns.items(), styles, strict=False):
        values = steps[column].to_numpy(float)
        drawable = np.isfinite(values) & ((values > 0) | (not log))
        if drawable.any():
            axes.plot(x, np.where(drawable, values, np.nan), dash, color=color, linewidth=1.3, label=label)
    if log and axes.lines:
        axes.set_yscale("log")
    axes.set_ylabel(title)


@register(
    "curves",
    of=SweepData,
    title="Training, arm by arm",
    guide="On the left what is learned; on the right the mismatch, which can also rise because a run collapses.",
    alt="Two panels over the steps with a line per arm, told apart by colour, dash and marker: mean reward of the "
    "sampled policy, and mean absolute mismatch on a log scale. Higher doses of one stress are darker.",
    needs=lambda data: len(data.steps) > 0,
    order=1,
)
def curves_figure(data: SweepData) -> Figure:
    """Reward and mismatch of every arm over the steps, means over seeds of a running window."""
    return draw_curves(data.steps, data.summary.arms)


def draw_curves(steps: pd.DataFrame, arms: Sequence[ArmResult]) -> Figure:
    """`curves_figure` of these arms; `steps` are those of all their runs, with the name of the `arm`."""
    with plot_settings():
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for arm, mark in zip(arms, _shades(arms), strict=True):
            rows = steps[steps["arm"] == arm.arm]
            for axes, column in ((left, "reward"), (right, "mean_abs_logprob_diff")):
                steps_of = rows.groupby("step")[column]
                # Cut where a run ended early: the mean of those that are left would rise by their absence.
                whole = steps_of.size() == steps_of.size().max()
                mean = steps_of.mean()[whole].rolling(5, min_periods=1).mean()
                values = mean.where(mean > 0) if axes is right else mean
                axes.plot(
                    values.index.to_numpy(),
                    values.to_numpy(float),
                    color=mark.color,
                    linestyle=mark.linestyle,
                    marker=mark.marker,
                    markevery=max(1, len(values) // 6),
                    markersize=4,
                    linewidth=1.3,
                    label=visible(arm.label),
                )
        left.set(xlabel="step", ylabel="mean reward of the sampled policy")
        right.set(xlabel="step", ylabel="mean |Δ log-prob| (nats)", yscale="log")
        for axes in (left, right):
            axes.grid(visible=True, color=_GRID, linewidth=0.6)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
        _note(figure, arms, "running means of 5 steps, up to where the first run of an arm ended")
    return figure


def _shades(arms: Sequence[ArmResult]) -> list[Look]:
    """Looks in which doses of one structure differ by lightness."""
    found = []
    for arm in arms:
        mark, siblings = arm_look(arm), [a for a in arms if arm.structure != "none" and a.structure == arm.structure]
        place = siblings.index(arm) / max(1, len(siblings) - 1) if len(siblings) > 1 else 1.0
        found.append(Look(_lighter(mark.color, 0.55 * (1 - place)), mark.linestyle, mark.marker))
    return found


def _lighter(color: str, share: float) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + (255 - p) * share):02x}" for p in parts)


@register(
    "dose",
    of=SweepData,
    title="Reward and stability against the measured mismatch",
    guide="Each marker is an arm at its measured mismatch; filled is the sampled policy, hollow the clean weights.",
    alt="Four panels with a marker per arm: final reward above, final over best reward below, against measured "
    "sequence ESS on the left and mean absolute gap on a log scale on the right. Whiskers are 95 % intervals; lines "
    "join the doses of one stress; vertical lines place compared models.",
    needs=lambda data: bool(_placed(data)),
)
def dose_figure(data: SweepData) -> Figure:
    """Final reward, and how much of the best reward was kept, against measured sequence ESS and mean |Δ log-prob|."""
    shown, places = _placed(data), data.summary.places
    with plot_settings():
        figure = Figure(figsize=(10.0, 7.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for column, dose in enumerate(("ess_seq", "mean_abs_logprob_diff")):
            _draw_doses(axes[0, column], shown, dose, "reward", hollow="clean_reward")
            _draw_doses(axes[1, column], shown, dose, "reward_kept")
            _draw_places((axes[0, column], axes[1, column]), places, dose)
        for panel in axes[1]:
            panel.axhline(1.0, color="#999999", linewidth=0.8)
            _mark_ends(panel, shown, "ess_seq" if panel is axes[1, 0] else "mean_abs_logprob_diff")
        axes[1, 0].set(xlabel="measured sequence ESS / n at the start (right is better)", ylabel="final / best reward")
        axes[1, 1].set(xlabel="measured mean |Δ log-prob| at the start (nats, left is better)", xscale="log")
        axes[0, 0].set_ylabel("final reward")
        axes[0, 0].set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))  # rewards are shares
        axes[1, 0].set_ylim(bottom=-0.03)
        axes[1, 1].xaxis.set_major_locator(LogLocator(numticks=8))
        axes[1, 1].xaxis.set_minor_locator(NullLocator())
        for panel in axes.flat:
            panel.grid(visible=True, color=_GRID, linewidth=0.6)
        handles = _handles(shown)
        columns = len(handles) if len(handles) <= 6 else 4
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        text = "whiskers: 95 % over seeds"
        if not all(np.isfinite(_at(arm, "mean_abs_logprob_diff")) for arm in shown):
            text += "; an arm without mismatch has no place on the right"
        _note(figure, shown, text)
    return figure


def _draw_doses(axes: Axes, arms: Sequence[ArmResult], dose: str, outcome: str, hollow: str = "") -> None:
    for family, structure in dict.fromkeys((arm.family, arm.structure) for arm in arms):
        if structure != "none":
            line = sorted((a for a in arms if (a.family, a.structure) == (family, structure)), key=lambda a: a.dose)
            xs, ys = [_at(a, dose) for a in line], [_at(a, outcome) for a in line]
            axes.plot(xs, ys, color=arm_look(line[0]).color, linestyle=arm_look(line[0]).linestyle, linewidth=0.9)
    for arm in arms:
        mark, value = arm_look(arm), getattr(arm, outcome)
        x = _at(arm, dose)
        if value.value is None or not np.isfinite(x):
            continue
        low, high = (value.value if v is None else v for v in (value.ci_low, value.ci_high))
        axes.vlines(x, low, high, color=mark.color, linewidth=1.0)
        axes.plot(x, value.value, mark.marker, color=mark.color, markersize=7, zorder=3)
        if hollow and (clean := getattr(arm, hollow).value) is not None:
            axes.plot(
                x, clean, mark.marker, markerfacecolor="white", markeredgecolor=mark.color, markersize=7, zorder=2
            )
        if arm.structure != "none":
            axes.annotate(f"{arm.dose:g}", (x, value.value), (6, -9), textcoords="offset points", fontsize=7)


def _at(arm: ArmResult, name: str) -> float:
    """Where an arm lies: nowhere without a value, nor, on the logarithmic axis of |d|, without mismatch."""
    x = getattr(arm, name).value
    return float("nan") if x is None or (x == 0 and name == "mean_abs_logprob_diff") else float(x)


def _mark_ends(axes: Axes, arms: Sequence[ArmResult], dose: str) -> None:
    """Says at an arm how many of its runs were lost, that is collapsed or diverged, where any were."""
    for arm in arms:
        ended, x = arm.n_lost, _at(arm, dose)
        if ended and arm.reward_kept.value is not None and np.isfinite(x):
            axes.annotate(
                f"{ended} of {arm.n_runs} lost",
                (x, arm.reward_kept.value),
                (6, 5),
                textcoords="offset points",
                fontsize=7,
                color="#b3261e",
            )


def _draw_places(panels: Sequence[Axes], places: Sequence[Place], dose: str) -> None:
    for index, place in enumerate(places):
        value: MetricValue = getattr(place, dose)
        if value.value is None:
            continue
        mark = look(place.dtype, index)
        for axes in panels:
            axes.axvline(value.value, color=mark.color, linestyle=mark.linestyle, linewidth=1.1, alpha=0.8)
            if value.ci_low is not None and value.ci_high is not None:
                axes.axvspan(value.ci_low, value.ci_high, color=mark.color, alpha=0.10, linewidth=0)
        panels[0].annotate(
            visible(place.label),
            (value.value, 0.02),
            (2, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            fontsize=7,
            color=mark.color,
            va="bottom",
        )


def _handles(arms: Sequence[ArmResult]) -> list[Line2D]:
    found: dict[str, Line2D] = {}
    several = len({arm.family for arm in arms if arm.structure != "none"}) > 1
    for arm in arms:
        mark = arm_look(arm)
        stress = f"{visible(arm.family)}, {arm.structure}" if several else f"stress: {arm.structure}"
        name = stress if arm.structure != "none" else visible(arm.label)
        found.setdefault(name, Line2D([], [], color=mark.color, marker=mark.marker, linestyle="none", label=name))
    clean = Line2D(
        [], [], marker="o", markerfacecolor="white", markeredgecolor="#555555", linestyle="none", label="clean weights"
    )
    return [*found.values(), clean]


def _note(figure: Figure, arms: Sequence[ArmResult], text: str) -> None:
    stressed = any(arm.structure != "none" for arm in arms)
    figure.suptitle(f"{text}; stress is {STRESS_NOTE}" if stressed else text, fontsize=8, color="#555555")


@register(
    "equal_ess",
    of=SweepData,
    title="Equal ESS, different structure",
    guide="Where the arm of higher ESS ends lower, ESS alone does not decide what becomes of a run.",
    alt="A row per pair of arms of equal ESS: a marker at the difference of their final rewards, a line for its 95 % "
    "interval over seeds, and a vertical line at 0.",
    needs=lambda data: bool(_matched(data)),
    order=2,
)
def equal_ess_figure(data: SweepData) -> Figure:
    """Differences of final reward between arms of equal ESS and different structure."""
    drawable = _matched(data)
    with plot_settings():
        figure = Figure(figsize=(8.0, 1.4 + 0.55 * len(drawable)), layout="constrained")
        axes = figure.subplots()
        for row, (_, value) in enumerate(drawable):
            if value.ci_low is not None and value.ci_high is not None:
                axes.hlines(row, value.ci_low, value.ci_high, color="#333333", linewidth=1.2)
            assert value.value is not None
            axes.plot(value.value, row, "o", color="#333333", markersize=5)
        axes.axvline(0.0, color="#999999", linewidth=0.8)
        axes.set_yticks(range(len(drawable)), [name for name, _ in drawable], fontsize=8)
        axes.set(xlabel="difference of final reward at equal measured ESS", ylim=(len(drawable) - 0.5, -0.5))
        axes.grid(visible=True, axis="x", color=_GRID, linewidth=0.6)
        if all(value.ci_low is None for _, value in drawable):
            axes.set_title("one seed: no intervals", fontsize=8, color="#555555")
    return figure


def _placed(data: SweepData) -> list[ArmResult]:
    """Arms with a measured dose and a reward."""
    return [arm for arm in data.summary.arms if arm.ess_seq.value is not None and arm.reward.value is not None]


def _matched(data: SweepData) -> list[tuple[str, MetricValue]]:
    """Names and differences of the pairs of arms of equal ESS."""
    response = data.summary.dose_response
    pairs = [] if response is None else [pair.comparison for pair in response.matched]
    named = [(f"{visible(pair.first)}\nminus {visible(pair.second)}", pair.difference) for pair in pairs]
    return [(name, value) for name, value in named if value.value is not None]
