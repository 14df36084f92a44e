"""The offline mismatch figure: token densities, and sequence log ratios against length, a row per dtype.

Layout after Qi et al., arXiv 2510.26788.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import look, plot_settings, say
from mismatch_probe.report.format import clipped, count, estimate, visible
from mismatch_probe.report.matrix import dtype_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from mismatch_probe.metrics.curves import LengthCurve, PolicyDensity

THOUSANDS_FROM = 2000
_WHY_CHARACTERS, _WHY_WIDTH = 110, 32
_DENSITY = LinearSegmentedColormap.from_list("density", matplotlib.colormaps["magma_r"](np.linspace(0.18, 1.0, 256)))


@figure(
    "policy",
    ReportData,
    "Token probabilities, and sequences by length",
    "Left, tokens off the dashed diagonal are more likely to one side than to the other; right, a sloping line means "
    "that the log ratio of a sequence drifts with its length.",
    "A row of two panels for each dtype. Left, a density of tokens, trainer probability against rollout "
    "probability, both from 0 to 1, with a dashed diagonal. Right, a dot for each sequence, its log ratio in nats "
    "against its length in tokens, with a fitted line and its slope.",
    needs=lambda data: bool(data.curves.density or data.curves.length),
)
def policy_figure(data: ReportData) -> Figure:
    """Left: μ(token) against π(token) as a density. Right: log(π/μ) of whole sequences against their length.

    The 16-bit dtypes share one symmetric y-scale on the right, so that their spread compares by eye; float32, orders of
    magnitude closer, has its own, and its panel says so.
    """
    density, length = data.curves.density, data.curves.length
    dtypes = dtype_order([*density, *length])
    with plot_settings():
        drawing = Figure(figsize=(5.6, 2.7 * len(dtypes) + 0.4), layout="constrained")
        grid = drawing.add_gridspec(len(dtypes), 2)
        left, right = ([drawing.add_subplot(grid[row, column]) for row in range(len(dtypes))] for column in (0, 1))
        _draw_densities(drawing, left, dtypes, density)
        _draw_lengths(right, dtypes, length)
    return drawing


def _draw_densities(
    figure: Figure, panels: list[Axes], dtypes: list[str], density: Mapping[str, PolicyDensity]
) -> None:
    peak = max((int(curve.counts.max(initial=0)) for curve in density.values()), default=0)
    norm = LogNorm(vmin=1, vmax=max(peak, 10))
    mesh: QuadMesh | None = None
    for axes, dtype in zip(panels, dtypes, strict=True):
        curve = density.get(dtype)
        axes.set_title(visible(dtype) if curve is None else f"{visible(dtype)} · {count(int(curve.n))} tokens")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="rollout probability μ(token)", aspect="equal")
        if curve is None or curve.n == 0:
            say(axes, "no tokens")
            continue
        counts = np.where(curve.counts.T > 0, curve.counts.T, np.nan)
        mesh = axes.pcolormesh(curve.edges, curve.edges, counts, norm=norm, cmap=_DENSITY, rasterized=True)
        axes.axline((0, 0), (1, 1), color="#6fc3ff", linewidth=0.8, linestyle=(0, (4, 3)))
    for axes in panels:
        axes.set_ylabel("trainer probability π(token)")
    if mesh is not None:
        # Inside the last panel's box, so that both columns of panels keep the same rows.
        bar = figure.colorbar(mesh, cax=panels[-1].inset_axes((0.1, 0.88, 0.4, 0.05)), orientation="horizontal")
        bar.set_label("tokens per cell", fontsize=8)


def _draw_lengths(panels: list[Axes], dtypes: list[str], length: Mapping[str, LengthCurve]) -> None:
    longest = max((float(np.max(curve.response_length, initial=0)) for curve in length.values()), default=0.0)
    unit = 1000.0 if longest >= THOUSANDS_FROM else 1.0
    shared = _symmetric_limit(curve for dtype, curve in length.items() if dtype != "float32")
    several = sum(dtype != "float32" for dtype in dtypes) > 1
    for axes, dtype in zip(panels, dtypes, strict=True):
        axes.set(xlabel="response length (thousand tokens)" if unit > 1 else "response length (tokens)", box_aspect=1)
        curve = length.get(dtype)
        if curve is None or len(curve.response_length) == 0:
            say(axes, "no sequences")
            continue
        own = dtype == "float32"
        limit = _symmetric_limit([curve]) if own else shared
        axes.set(xlim=(0, longest / unit * 1.05), ylim=(-limit, limit))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        _draw_length(axes, dtype, curve, unit)
        if own and len(dtypes) > 1:
            axes.set_title("own y-scale", loc="right", fontsize=8, style="italic", color="#555555")
        elif several:
            axes.set_title("shared y-scale", loc="right", fontsize=8, style="italic", color="#555555")
    for axes in panels:
        axes.set_ylabel("log(π/μ) of a sequence (nats)")


def _draw_length(axes: Axes, dtype: str, curve: LengthCurve, unit: float) -> None:
    mark = look(dtype)
    axes.axhline(0, color="#777777", linewidth=0.6, linestyle=(0, (4, 3)), zorder=0.5)
    axes.plot(
        curve.response_length / unit,
        curve.seq_log_ratio,
        mark.marker,
        color=mark.color,
        markersize=3.5,
        alpha=0.45,
        markeredgewidth=0,
        label="sequences",
    )
    if curve.slope_per_1k is None or curve.intercept is None:
        why = clipped(visible(curve.why or "no reason recorded"), _WHY_CHARACTERS)
        text = textwrap.fill(f"not fitted: {why}", _WHY_WIDTH)
    else:
        ends = np.array([float(np.min(curve.response_length)), float(np.max(curve.response_length))])
        axes.plot(
            ends / unit, curve.intercept + curve.slope_per_1k * ends / 1000.0, color="black", linewidth=1.4, label="fit"
        )
        low, high = curve.slope_ci or (None, None)
        text = f"slope {estimate(curve.slope_per_1k, low, high)}\nnats per 1K tokens"
        if curve.why:
            text += "\n" + textwrap.fill(clipped(visible(curve.why), _WHY_CHARACTERS), _WHY_WIDTH)
    note = axes.text(0.03, 0.03, text, transform=axes.transAxes, fontsize=8, va="bottom", parse_math=False)
    note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5})


def _symmetric_limit(curves: Iterable[LengthCurve]) -> float:
    """Half the height of a panel around zero: the largest finite |D| and room for the note, 1 where all are zero."""
    values = [np.abs(curve.seq_log_ratio[np.isfinite(curve.seq_log_ratio)]) for curve in curves]
    largest = max((float(np.max(value, initial=0.0)) for value in values), default=0.0)
    return 1.6 * largest if largest > 0 else 1.0
