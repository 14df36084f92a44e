"""How dtypes and rows look in every figure, and the few matplotlib settings that make bytes reproducible.

Hue, lightness, line style and marker all differ, so that a dtype is recognised on a grey print.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from mismatch_probe.report.format import clipped, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes

    from mismatch_probe.types import MetricValue

DPI = 150
_TICK_CHARACTERS = 28
_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Look:
    color: str
    linestyle: str
    marker: str


_LOOKS = {
    "bfloat16": Look("#d95f02", "-", "o"),
    "float16": Look("#1f5fa8", "--", "s"),
    "float32": Look("#111111", ":", "^"),
}
_OTHERS = (Look("#7a3b8f", "-.", "D"), Look("#5a8f29", "-.", "v"))


def look(dtype: str, index: int = 0) -> Look:
    """The look of `dtype`; dtypes without a look of their own take turns by `index`."""
    return _LOOKS.get(dtype) or _OTHERS[index % len(_OTHERS)]


def plot_settings() -> AbstractContextManager[None]:
    """The settings that every figure is drawn under, whatever the user's matplotlibrc says about them."""
    return matplotlib.rc_context(_RC)  # type: ignore[arg-type]


def tick(label: object) -> str:
    """A pair's, a dtype's or a bin's name beside an axis, a mode in parentheses on a line of its own."""
    return clipped(visible(label), _TICK_CHARACTERS).replace(" (", "\n(")


def say(axes: Axes, text: str, *, y: float = 0.5) -> None:
    """Write `text` into an empty panel."""
    axes.text(0.5, y, text, transform=axes.transAxes, ha="center", va="center", color="#555555", parse_math=False)


GRID, INK, DIM = "#e4e4e4", "#222222", "#555555"
SIDES = {"rollout": Look("#1f5fa8", "-", "o"), "trainer": Look("#d95f02", "-", "s")}
"""How a setting of the engine looks, and one of the trainer."""
_LABEL_CHARACTERS, _LABEL_WIDTH = 96, 44
# Ticks of a logarithmic axis within a decade, from few to many.
_TICKS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
_FEWEST_TICKS, _MOST_TICKS = 4, 9


def row_label(text: object, width: int = _LABEL_WIDTH) -> str:
    """What a row is called, on at most a few lines."""
    return textwrap.fill(clipped(visible(text), _LABEL_CHARACTERS), width)


def limits_of(metric: MetricValue | None) -> tuple[float, float] | None:
    """Both ends of an interval, None where one is absent."""
    if metric is None or metric.ci_low is None or metric.ci_high is None:
        return None
    return metric.ci_low, metric.ci_high


def name_rows(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Rows from top to bottom, named at the left."""
    axes.set_yticks(places, names, fontsize=8.5, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(places, default=0.0) + 0.6, min(places, default=0.0) - 0.6)
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def beside(axes: Axes, y: float, text: str, offset: float, weight: str = "normal") -> None:
    """Text of a row in a column `offset` points right of the panel."""
    axes.annotate(
        text,
        (1.0, y),
        (offset, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        parse_math=False,
        annotation_clip=False,
        fontsize=8,
        color=INK,
        weight=weight,
    )


def heading_beside(axes: Axes, text: str, offset: float) -> None:
    """What a column right of the panel holds."""
    axes.annotate(
        text, (1.0, 1.0), (offset, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=DIM
    )


def bounds_of(values: Sequence[float], ends: Iterable[float], room: float) -> tuple[float, float]:
    """Limits of an axis that holds all values, and of the ends of intervals those within `room` of a value."""
    low, high = min(values), max(values)
    near = [*values, *(end for end in ends if low - room <= end <= high + room)]
    return min(near), max(near)


def whisker(axes: Axes, y: float, ends: tuple[float, float], color: str) -> None:
    """A horizontal interval; an end beyond the panel is an arrow at its edge. The panel has its limits already."""
    left, right = axes.get_xlim()
    low, high = max(ends[0], left), min(ends[1], right)
    if low > high:
        return
    axes.hlines(y, low, high, color=color, linewidth=1.4, zorder=2.4)
    if ends[0] < left:
        axes.plot([left], [y], marker=CARETLEFT, color=color, markersize=6)
    if ends[1] > right:
        axes.plot([right], [y], marker=CARETRIGHT, color=color, markersize=6)


def ratio_axis(axes: Axes, metrics: Sequence[MetricValue]) -> None:
    """A logarithmic x axis from the metrics' values, with 1 on it and ticks that can be read."""
    values = [math.log(metric.value) for metric in metrics if metric.value]
    ends = [math.log(end) for metric in metrics for end in limits_of(metric) or () if end > 0]
    low, high = bounds_of([0.0, *values], ends, math.log(1.5))
    pad = max(0.06 * (high - low), 0.01)
    axes.set_xscale("log")
    axes.set_xlim(math.exp(low - pad), math.exp(high + pad))
    axes.xaxis.set_major_locator(FixedLocator(ratio_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1.0, color=INK, linewidth=1.0, zorder=1.5)


def ratio_ticks(low: float, high: float) -> list[float]:
    """Four to nine ticks of a logarithmic axis between two positive numbers, the roundest there are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _TICKS:
        inside = [tick for d in decades for step in steps if low <= (tick := step * 10.0**d) <= high]
        if _FEWEST_TICKS <= len(inside) <= _MOST_TICKS:
            return inside
    if high / low > 10.0:
        every = math.ceil(len(decades) / _MOST_TICKS)
        return [10.0**d for d in decades[::every] if low <= 10.0**d <= high]
    return [float(tick) for tick in MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
