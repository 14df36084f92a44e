"""Exact KL of every pair as a figure, and beside it what the sampled estimators make of the same pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import look, plot_settings, tick
from mismatch_probe.report.format import number
from mismatch_probe.report.matrix import EXACT, has_exact, modes_of, ordered_pairs, trainer_label
from mismatch_probe.types import MetricValue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mismatch_probe.results.comparison import Comparison, Pair

RATIO_LIMITS = (-1.0, 3.0)
_GAP = 0.5


@dataclass(frozen=True)
class _Mark:
    key: str
    label: str
    color: str
    marker: str
    face: str


_MARKS = (
    _Mark(EXACT, "exact rows", "#111111", "D", "#111111"),
    _Mark("kl_k1", "k1", "#b2182b", "o", "#ffffff"),
    _Mark("kl_k2", "k2", "#2166ac", "s", "#ffffff"),
    _Mark("kl_k3", "k3", "#4d9221", "^", "#4d9221"),
)


@dataclass(frozen=True)
class _Slot:
    """A pair's place on the x-axis."""

    x: float
    pair: Pair

    def metric(self, key: str) -> MetricValue:
        return self.pair.metrics[key]

    @property
    def unit(self) -> float | None:
        """The pair's exact KL where something can be measured in it."""
        value = self.metric(EXACT).value
        return value if value is not None and value > 0 else None


@figure(
    "exact",
    ReportData,
    "Exact KL of every pair, and what sampled estimates make of it",
    "Above, how far apart the two policies are; below, the shorter an interval, the more that estimate makes of the "
    "run's tokens.",
    "Two panels over the pairs, grouped by rollout dtype. Above, the exact KL of each pair in nats per token on a "
    "logarithmic axis, with its 95 % interval. Below, the exact value and the estimates k1, k2 and k3, each with a "
    "marker of its own, divided by the exact KL; a line marks 1.",
    needs=lambda data: has_exact(data.summary),
    order=3,
)
def exact_figure(data: ReportData) -> Figure:
    """Above, exact KL(μ‖π) of every pair; below, k1, k2 and k3 of the same pair in units of it. 95 % intervals.

    Gaps of dtypes lie decades apart, so that the widths of the intervals only show in units of the pair's own KL. What
    leaves that panel ends in an arrow, with its value where the estimate itself is outside.
    """
    with plot_settings():
        slots = _slots(data.summary)
        drawing = Figure(figsize=(max(0.42 * slots[-1].x + 1.4, 5.2), 6.8), layout="constrained")
        top, bottom = drawing.subplots(2, 1, sharex=True, height_ratios=(1.0, 1.3))
        _draw_exact(top, slots)
        _draw_ratios(bottom, slots)
        modes = modes_of(data.summary)
        labels = [tick(trainer_label(slot.pair, modes)) for slot in slots]
        bottom.set_xticks([slot.x for slot in slots], labels, fontsize=8, rotation=90, parse_math=False)
        bottom.set(xlim=(-0.6, slots[-1].x + 0.6), xlabel="trainer π")
        for axes in (top, bottom):
            axes.tick_params(axis="x", length=0)
            axes.set_axisbelow(True)
        _draw_groups(top, bottom, slots)
    return drawing


def _slots(summary: Comparison) -> list[_Slot]:
    """The pairs side by side, a gap between rollout dtypes."""
    slots: list[_Slot] = []
    x = 0.0
    for _, group in groupby(ordered_pairs(summary), key=lambda pair: pair.rollout_dtype):
        for pair in group:
            slots.append(_Slot(x, pair))
            x += 1.0
        x += _GAP
    return slots


def _draw_exact(axes: Axes, slots: list[_Slot]) -> None:
    axes.set(yscale="log", ylabel="exact KL(μ‖π) (nats per token)")
    axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
    drawn: list[float] = []
    for slot in slots:
        exact, mark = slot.metric(EXACT), look(slot.pair.trainer_dtype)
        if slot.unit is None:
            # On a logarithmic axis neither zero nor nothing has a place.
            axes.text(slot.x, 0.03, number(exact.value), transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
            continue
        axes.plot(slot.x, slot.unit, mark.marker, color=mark.color, markersize=4.5)
        ends = [slot.unit]
        if exact.ci_low is not None and exact.ci_high is not None and exact.ci_low > 0:
            axes.vlines(slot.x, exact.ci_low, exact.ci_high, color=mark.color, linewidth=1.6)
            ends += [exact.ci_low, exact.ci_high]
        drawn += ends
        at = (slot.x, max(ends))
        axes.annotate(number(slot.unit), at, (0, 5), textcoords="offset points", ha="center", fontsize=8, rotation=90)
    if drawn:
        axes.set_ylim(min(drawn) / 10.0, max(drawn) * 3e4)
    else:
        axes.set(yticks=[])
        axes.minorticks_off()


def _draw_ratios(axes: Axes, slots: list[_Slot]) -> None:
    low, high = RATIO_LIMITS
    axes.set(ylim=(low, high), ylabel="estimate / exact KL(μ‖π)")
    axes.axhline(1.0, color="#777777", linewidth=0.8, zorder=0.5)
    axes.axhline(0.0, color="#777777", linewidth=0.6, linestyle=(0, (4, 3)), zorder=0.5)
    axes.grid(visible=True, axis="y", color="#eeeeee", linewidth=0.6)
    for slot in slots:
        for k, mark in enumerate(_MARKS):
            if slot.unit is not None:
                _draw_ratio(axes, slot.x + 0.2 * (k - 1.5), slot.metric(mark.key), slot.unit, mark)
    legend = [
        Line2D([], [], color=mark.color, marker=mark.marker, markerfacecolor=mark.face, label=mark.label)
        for mark in _MARKS
    ]
    axes.legend(
        handles=legend, loc="lower center", bbox_to_anchor=(0.5, 1.07), ncols=4, frameon=False, columnspacing=1.0
    )


def _draw_ratio(axes: Axes, x: float, value: MetricValue, unit: float, mark: _Mark) -> None:
    """An estimate in units of the exact KL; nothing where the pair has none."""
    if value.value is None:
        return
    low, high = RATIO_LIMITS
    ratio = value.value / unit
    if low <= ratio <= high:
        axes.plot(x, ratio, mark.marker, color=mark.color, markerfacecolor=mark.face, markersize=5)
    else:
        # Above the panel there is room for a number; below it stand the dtypes, so that one goes beside its arrow.
        end, offset, ha = (high, (0, 4), "center") if ratio > high else (low, (5, 3), "left")
        axes.annotate(f"{number(ratio, 2)}×", (x, end), offset, textcoords="offset points", ha=ha, va="bottom")
    ends = (
        (value.ci_low, value.ci_high) if value.ci_low is not None and value.ci_high is not None else (value.value,) * 2
    )
    lowest, highest = ends[0] / unit, ends[1] / unit
    axes.vlines(x, min(max(lowest, low), high), max(min(highest, high), low), color=mark.color, linewidth=1.2)
    for beyond, end, marker in ((highest > high, high, "^"), (lowest < low, low, "v")):
        if beyond:
            axes.plot(x, end, marker, color=mark.color, markersize=5, clip_on=False, zorder=3)


def _draw_groups(top: Axes, bottom: Axes, slots: list[_Slot]) -> None:
    """Name each rollout dtype above its pairs, and say below why some of them have no k1."""
    for rollout, group in groupby(slots, key=lambda slot: slot.pair.rollout_dtype):
        places = [slot.x for slot in group]
        middle = (places[0] + places[-1]) / 2.0
        top.text(
            middle,
            1.03,
            f"μ: {tick(rollout)}",
            transform=top.get_xaxis_transform(),
            ha="center",
            parse_math=False,
        )
        if places[-1] < slots[-1].x:
            for axes in (top, bottom):
                axes.axvline(places[-1] + (1.0 + _GAP) / 2.0, color="#cccccc", linewidth=0.8)
    if any(slot.unit is not None and slot.metric("kl_k1").value is None for slot in slots):
        bottom.set_xlabel("trainer π\nno k1 where another policy sampled the tokens", linespacing=1.6)
