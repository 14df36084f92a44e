"""The rollout × trainer matrix as a heat map."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import plot_settings
from mismatch_probe.report.format import clipped, interval, number, visible
from mismatch_probe.report.matrix import DEFAULT_METRIC, matrix_of
from mismatch_probe.report.names import metric_title
from mismatch_probe.results.comparison import MissingPair, Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
