"""Figures of pairs: the matrix, exact KL beside the sampled estimators, and the error budget."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from mismatch_probe.report.data import (
    DEFAULT_METRIC,
    EXACT,
    ReportData,
    diagonal_pairs,
    has_exact,
    matrix_of,
    modes_of,
    noise_floor,
    ordered_pairs,
    trainer_label,
)
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import look, plot_settings, tick
from mismatch_probe.report.format import clipped, interval, metric_title, number, visible
from mismatch_probe.results.comparison import MissingPair, Pair
from mismatch_probe.types import MetricValue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from mismatch_probe.results.comparison import Comparison, Pair

_COLORS = "OrRd"
_WHY_CHARACTERS, _WHY_WIDTH = 72, 18


@figure(
    "matrix",
    ReportData,
    "Every rollout dtype with every trainer dtype",
    "Lighter is closer; a value at its self-noise is as close as an engine is to itself.",
    "A matrix with a row for each rollout dtype and a column for each trainer dtype. A cell holds the mean |d| of the "
    "pair in nats, its 95 % interval and the self-noise; darker is larger. A hatched cell says why there is no value.",
    needs=lambda data: bool(data.summary.pairs or data.summary.missing),
    order=2,
)
def matrix_figure(data: ReportData) -> Figure:
    """A cell per pair: value, 95 % interval and self-noise, on a logarithmic colour scale; hatched where missing."""
    matrix = matrix_of(data.summary)
    with plot_settings():
        size = (1.35 * len(matrix.columns) + 1.6, 1.05 * len(matrix.rows) + 1.35)
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.add_subplot()
        values = np.array(
            [[_shown(matrix.pairs.get((row, column))) for column in matrix.columns] for row in matrix.rows]
        )
        image = axes.imshow(values, cmap=_COLORS, norm=_norm(values), aspect="auto")
        for i, row in enumerate(matrix.rows):
            for j, column in enumerate(matrix.columns):
                _draw_cell(axes, j, i, matrix.pairs.get((row, column)), dark=_is_dark(values[i, j], image.norm))
        axes.set_xticks(range(len(matrix.columns)), [visible(name).replace(" (", "\n(") for name in matrix.columns])
        axes.set_yticks(range(len(matrix.rows)), [visible(name) for name in matrix.rows])
        axes.set(xlabel="trainer π", ylabel="rollout μ")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(1, len(matrix.columns)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(matrix.rows)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        drawing.colorbar(image, ax=axes, label=metric_title(DEFAULT_METRIC), pad=0.02)
    return drawing


def _shown(pair: Pair | MissingPair | None) -> float:
    value = pair.metrics[DEFAULT_METRIC].value if isinstance(pair, Pair) else None
    return float("nan") if value is None else value


def _norm(values: np.ndarray[Any, np.dtype[np.float64]]) -> LogNorm:
    """Whole decades around the positive values: a scale with ticks even for one value; zero gets the lightest."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size == 0:
        return LogNorm(1e-8, 1.0, clip=True)
    low, high = float(positive.min()), float(positive.max())
    return LogNorm(10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high) + 1e-9), clip=True)


def _is_dark(value: float, norm: Any) -> bool:
    if not np.isfinite(value):
        return False
    red, green, blue, _ = matplotlib.colormaps[_COLORS](float(norm(value)))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _draw_cell(axes: Axes, x: int, y: int, pair: Pair | MissingPair | None, *, dark: bool) -> None:
    found = pair.metrics[DEFAULT_METRIC] if isinstance(pair, Pair) else None
    if found is None or found.value is None or not np.isfinite(found.value):
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#f2f2f2", edgecolor="#bbbbbb", hatch="///", linewidth=0)
        )
        reason = pair.why if isinstance(pair, MissingPair) else "not run" if found is None else found.why
        why = clipped(visible(reason or "no value"), _WHY_CHARACTERS)
        text = why if found is None or found.value is None else f"{number(found.value)}\n{why}"
        text = "\n".join(textwrap.fill(line, _WHY_WIDTH) for line in text.split("\n"))
        label = axes.text(x, y, text, ha="center", va="center", fontsize=7, parse_math=False)
        label.set_bbox({"facecolor": "#f2f2f2", "edgecolor": "none", "pad": 1.5})
        return
    color = "white" if dark else "black"
    noise = pair.self_noise.mean_abs if isinstance(pair, Pair) else None
    below = [interval(found.ci_low, found.ci_high), "" if noise is None else f"self-noise {number(noise, 2)}"]
    _annotate(axes, (x, y), number(found.value), above=8, va="center", color=color, fontsize=12, weight="bold")
    _annotate(axes, (x, y), "\n".join(line for line in below if line), above=-3, va="top", color=color, fontsize=8)


def _annotate(axes: Axes, at: tuple[int, int], text: str, *, above: float, **style: Any) -> None:
    """Write `text` at a cell, moved up by `above` points: lines keep their distance in cells of any height."""
    axes.annotate(text, at, (0, above), textcoords="offset points", ha="center", **style)


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


_BAR_WIDTH = 0.2
_NOTE_WIDTH, _REFERENCE_CHARACTERS = 72, 60


@dataclass(frozen=True)
class _Bar:
    key: str
    label: str
    color: str
    hatch: str = ""


# Lightness and hatch tell them apart on a grey print; black intervals show on all four.
_BARS = (
    _Bar("rollout_error_rms", r"error of the rollout engine, $e_\mu$", "#5b8fc9"),
    _Bar("trainer_error_rms", r"error of the trainer, $e_\pi$", "#c9dcf0"),
    _Bar("predicted_gap_rms", r"gap if they are independent, $\sqrt{e_\mu^2 + e_\pi^2}$", "#ffffff", "////"),
    _Bar("measured_gap_rms", "measured gap", "#f0b277", "...."),
)


def has_budget(summary: Comparison) -> bool:
    """Whether a pair of equal dtypes has errors against a reference."""
    return any(_bars_of(pair) for pair in diagonal_pairs(summary).values())


@figure(
    "budget",
    ReportData,
    "Whose errors make the gap",
    "The taller of the two blue bars is the side that is further off; a measured gap as high as the hatched bar is "
    "what independent errors make.",
    "Four bars for each dtype on a logarithmic axis in nats: the error of the rollout, the error of the trainer, the "
    "gap that they predict if they are independent (hatched), and the measured gap (dotted), with 95 % intervals. "
    "Horizontal lines mark the gap in FP32 and the noise floor of an FP32 reference.",
    needs=lambda data: has_budget(data.summary),
    order=4,
)
def budget_figure(data: ReportData) -> Figure:
    """Per dtype: the two errors, the gap that they predict in quadrature, and the measured one, with 95 % intervals.

    Lines across all dtypes show what no 16-bit format has a part in: the float32–float32 gap and, with a float64
    reference, how far float32 itself is from it.
    """
    summary = data.summary
    with plot_settings():
        pairs = {name: pair for name, pair in diagonal_pairs(summary).items() if _bars_of(pair)}
        drawing = Figure(figsize=(max(1.5 * len(pairs) + 0.9, 5.2), 5.6), layout="constrained")
        axes = drawing.add_subplot()
        axes.set(yscale="log", ylabel="RMS over tokens (nats)", xlim=(-0.6, len(pairs) - 0.4))
        axes.set_ylim(*_limits(pairs.values()))
        axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        for x, pair in enumerate(pairs.values()):
            for k, bar in enumerate(_BARS):
                at = x + (k - 1.5) * _BAR_WIDTH
                _draw_bar(axes, at, bar, _value(pair, bar.key), label=bar.label if x == 0 else "")
        axes.set_xticks(range(len(pairs)), [tick(name) for name in pairs], parse_math=False)
        axes.tick_params(axis="x", length=0)
        _draw_floors(axes, summary)
        bars_first = sorted(
            zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: isinstance(entry[0], Line2D)
        )
        drawing.legend(
            *zip(*bars_first, strict=True), loc="outside upper center", ncols=1, frameon=False, handlelength=2.6
        )
        drawing.supxlabel(textwrap.fill(_note(summary), _NOTE_WIDTH), fontsize=8, color="#555555", parse_math=False)
    return drawing


def _value(pair: Pair, key: str) -> MetricValue:
    return (pair.budget or {}).get(key, MetricValue(None))


def _bars_of(pair: Pair) -> list[MetricValue]:
    """Those of a pair's four bars that have a value."""
    values = (_value(pair, bar.key) for bar in _BARS)
    return [value for value in values if value.value is not None]


def _limits(pairs: Iterable[Pair]) -> tuple[float, float]:
    """Half a decade below the lowest bar, and room for its value above the highest."""
    values = [value for pair in pairs for value in _bars_of(pair)]
    ends = [end for value in values for end in (value.value, value.ci_low, value.ci_high)]
    positive = [end for end in ends if end and end > 0]
    return (min(positive) / 3.0, max(positive) * 10.0) if positive else (1e-8, 1.0)


def _draw_bar(axes: Axes, x: float, bar: _Bar, value: MetricValue, *, label: str) -> None:
    """A bar from the bottom of the logarithmic axis, which has no zero: that one is written instead."""
    bottom = axes.get_ylim()[0]
    height = value.value if value.value is not None and value.value > bottom else 0.0
    axes.bar(
        x, height, _BAR_WIDTH, color=bar.color, hatch=bar.hatch, edgecolor="#222222", linewidth=0.7, label=label or None
    )
    top = max(height, bottom)
    if height and value.ci_low is not None and value.ci_high is not None:
        axes.vlines(x, max(value.ci_low, bottom), value.ci_high, color="black", linewidth=1.3)
        top = value.ci_high
    axes.annotate(
        number(value.value), (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8, rotation=90
    )


def _draw_floors(axes: Axes, summary: Comparison) -> None:
    gap, floor = _float32_gap(summary), noise_floor(summary)
    if gap is not None and gap.value:
        label = f"float32–float32 gap: {number(gap.value)} nats"
        axes.axhline(gap.value, color="#333333", linewidth=1.0, linestyle="--", label=label, zorder=0.9)
    if floor is not None and floor.value:
        label = f"noise floor of a float32 reference: {number(floor.value)} nats"
        axes.axhline(floor.value, color="#333333", linewidth=1.2, linestyle=":", label=label, zorder=0.9)


def _float32_gap(summary: Comparison) -> MetricValue | None:
    both = (pair for pair in diagonal_pairs(summary).values() if pair.rollout_dtype == "float32")
    gaps = (_value(pair, "measured_gap_rms") for pair in both)
    return next((gap for gap in gaps if gap.value is not None), None)


def _note(summary: Comparison) -> str:
    """What the errors are against, and what that does to them."""
    reference = clipped(visible(summary.reference or "an unnamed reference"), _REFERENCE_CHARACTERS)
    note = f"Errors against {reference}. A Hugging Face reference charges every difference of implementation to the "
    note += "rollout engine"
    gap = _float32_gap(summary)
    if gap is None:
        return f"{note}; no float32–float32 pair shows how large those are."
    return f"{note}; the float32–float32 gap shows how large those are where precision is not in question."
