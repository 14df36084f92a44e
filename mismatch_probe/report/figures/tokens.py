"""Figures of tokens: how many differ by how much, where they lie, and which ones the squared gap comes from.

The layout of the policy figure is that of Qi et al., arXiv 2510.26788.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mismatch_probe.report.data import ReportData, dtype_order
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import look, plot_settings, say, tick
from mismatch_probe.report.format import WHERE_TITLES, bin_order, clipped, count, estimate, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.curves import BinnedDiff, Ccdf, WhereBin
    from mismatch_probe.results.comparison import Comparison

    Bins = Sequence[WhereBin]
    from collections.abc import Iterable

    from matplotlib.collections import QuadMesh

    from mismatch_probe.metrics.curves import LengthCurve, PolicyDensity


@figure(
    "ccdf",
    ReportData,
    "How many tokens differ by how much",
    "Read up from a size of |d| to the fraction of tokens that differ by at least that much; further left is better.",
    "One line for each dtype on logarithmic axes: the fraction of tokens whose |d| is at least x, against x in nats. "
    "Dtypes differ in colour and line style.",
    needs=lambda data: bool(data.curves.ccdf),
    order=1,
)
def ccdf_figure(data: ReportData) -> Figure:
    """The fraction of tokens whose |d| is at least x, for all dtypes in one log-log panel."""
    ccdf = data.curves.ccdf
    with plot_settings():
        drawing = Figure(figsize=(5.2, 4.0), layout="constrained")
        axes = drawing.add_subplot()
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="|d| = |log π − log μ| of a token (nats)",
            ylabel="fraction of tokens with |d| ≥ x",
        )
        for index, dtype in enumerate(dtype_order(ccdf)):
            curve, mark = ccdf[dtype], look(dtype, index)
            drawable = (curve.abs_diff > 0) & (curve.share > 0)
            label = visible(dtype) if drawable.any() else f"{visible(dtype)}: no difference above 0"
            axes.plot(
                curve.abs_diff[drawable],
                curve.share[drawable],
                color=mark.color,
                linestyle=mark.linestyle,
                linewidth=1.8,
                label=label,
            )
        start = _ccdf_start(ccdf)
        if start is None:
            _say_zero(axes)
        else:
            axes.set_xlim(left=start)
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.6)
        axes.legend(frameon=False, handlelength=3.2, loc="lower left")
    return drawing


def _ccdf_start(ccdf: Mapping[str, Ccdf]) -> float | None:
    """Where the axis starts: a decade left of the first bend, below which every curve is flat. None if all are 0."""
    bends = []
    for curve in ccdf.values():
        positive = curve.abs_diff[curve.abs_diff > 0]
        bent = curve.abs_diff[(curve.abs_diff > 0) & (curve.share < 0.99)]
        if positive.size:
            bends.append(float(bent.min() if bent.size else positive.min()))
    return min(bends) / 10.0 if bends else None


def _say_zero(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.minorticks_off()
    say(axes, "No difference above 0.")


@figure(
    "where",
    ReportData,
    "Where the gap lies",
    "Rounding is largest at improbable tokens and flat in position; a rise with position has another cause.",
    "Two panels of the mean |d| in nats on a logarithmic axis, one line with a 95 % band for each dtype: first over "
    "bins of the rollout probability of the token, second over the position in the response, in tokens.",
    needs=lambda data: bool(data.curves.by_probability or data.curves.by_position),
    order=5,
)
def where_figure(data: ReportData) -> Figure:
    """Mean |d| by the token's rollout probability and by its position in the response, with 95 % bands."""
    by_probability, by_position = data.curves.by_probability, data.curves.by_position
    with plot_settings():
        drawing = Figure(figsize=(5.2, 6.6), layout="constrained")
        left, right = drawing.subplots(2, 1, sharey=True)
        _draw_by_probability(left, by_probability)
        _draw_by_position(right, by_position)
        left.set_ylabel("mean |d| (nats)")
        right.set_ylabel("mean |d| (nats)")
        _limit_to_means(left, [*by_probability.values(), *by_position.values()])
        for axes in (left, right):
            axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
        handles, labels = (left if by_probability else right).get_legend_handles_labels()
        if handles:
            drawing.legend(
                handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, handlelength=3.2
            )
    return drawing


def _limit_to_means(axes: Axes, curves: Sequence[BinnedDiff]) -> None:
    """Keep a decade around the means: an interval from a handful of prompts can be wider than everything else."""
    positive = np.concatenate([curve.mean_abs[curve.mean_abs > 0] for curve in curves])
    if positive.size:
        axes.set_ylim(float(positive.min()) / 10.0, float(positive.max()) * 10.0)


def _draw_by_probability(axes: Axes, curves: Mapping[str, BinnedDiff]) -> None:
    """Bins stand side by side, equally wide: most of them lie too close to 0 or 1 for a linear axis."""
    axes.set(xlabel="rollout probability μ(token)")
    if not _has_place(axes, curves):
        return
    edges = sorted(
        {
            (float(low), float(high))
            for curve in curves.values()
            for low, high in zip(curve.left, curve.right, strict=True)
        }
    )
    place = {edge: index for index, edge in enumerate(edges)}
    for index, dtype in enumerate(dtype_order(curves)):
        curve = curves[dtype]
        x = np.array(
            [place[float(low), float(high)] for low, high in zip(curve.left, curve.right, strict=True)],
            dtype=np.float64,
        )
        _draw_band(axes, x, dtype, index, curve)
    axes.set_xticks(
        range(len(edges)),
        [f"{low:.3g}–{high:.3g}" for low, high in edges],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )


def _has_place(axes: Axes, curves: Mapping[str, BinnedDiff]) -> bool:
    """Whether anything lies above zero; otherwise the panel says why it stays empty."""
    if not curves:
        say(axes, "no tokens")
    elif not any((curve.mean_abs > 0).any() for curve in curves.values()):
        _say_zero(axes)
    else:
        return True
    return False


def _draw_by_position(axes: Axes, curves: Mapping[str, BinnedDiff]) -> None:
    axes.set(xlabel="position in the response (tokens)")
    if not _has_place(axes, curves):
        return
    widths = np.concatenate([curve.right - curve.left for curve in curves.values()])
    geometric = float(widths.max()) > 2.0 * float(widths.min())
    for index, dtype in enumerate(dtype_order(curves)):
        curve = curves[dtype]
        middle = np.sqrt(np.maximum(curve.left, 1.0) * curve.right) if geometric else (curve.left + curve.right) / 2.0
        _draw_band(axes, middle, dtype, index, curve)
    if geometric:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _draw_band(
    axes: Axes, x: np.ndarray[tuple[int], np.dtype[np.float64]], dtype: str, index: int, curve: BinnedDiff
) -> None:
    """Draw one dtype's means and band on a log scale, on which what is not above zero has no place."""
    mark = look(dtype, index)
    drawable = np.isfinite(curve.mean_abs) & (curve.mean_abs > 0)
    mean = np.where(drawable, curve.mean_abs, np.nan)
    label = visible(dtype) if drawable.any() else f"{visible(dtype)}: no difference above 0"
    axes.set_yscale("log")
    axes.plot(
        x,
        mean,
        color=mark.color,
        linestyle=mark.linestyle,
        marker=mark.marker,
        markersize=4,
        linewidth=1.5,
        label=label,
    )
    banded = drawable & np.isfinite(curve.ci_low) & np.isfinite(curve.ci_high)
    if banded.any():
        # A band between two bins needs both of their intervals; the bar at a bin needs only its own.
        floor = np.where(curve.ci_low > 0, curve.ci_low, mean / 10.0)
        axes.fill_between(x, floor, curve.ci_high, where=banded.tolist(), color=mark.color, alpha=0.22, linewidth=0)
        axes.vlines(x[banded], floor[banded], curve.ci_high[banded], color=mark.color, linewidth=0.9, alpha=0.7)


# Position is left to the figure of mean |d|.
PROPERTIES = tuple(name for name in WHERE_TITLES if name != "position")
_TOKENS = "#c4c4c4"


def has_shares(summary: Comparison) -> bool:
    """Whether the tokens of any pair were sorted by a property."""
    return any(bins.get(name) for bins in summary.where.values() for name in PROPERTIES)


@figure(
    "share",
    ReportData,
    "Which tokens the squared gap comes from",
    "Where the upper bar is the longer one, tokens of that bin add more to Σ d² than their number explains.",
    "A row of panels for each property of a token (rollout probability, entropy, rank, kind) and a column for each "
    "dtype. Each bin has two horizontal bars: above in the colour of the dtype its contribution to the sum of d², "
    "below in grey its fraction of the tokens, both in percent.",
    needs=lambda data: has_shares(data.summary),
    order=6,
)
def share_figure(data: ReportData) -> Figure:
    """Contribution to Σ d² and fraction of tokens per bin: a row per property, a column per dtype."""
    where = data.summary.where
    properties = [name for name in PROPERTIES if any(bins.get(name) for bins in where.values())]
    with plot_settings():
        pairs = [name for name in dtype_order(where) if any(where[name].get(key) for key in properties)]
        labels = {key: bin_order(row.label for name in pairs for row in where[name].get(key, ())) for key in properties}
        heights = [len(labels[key]) + 1.0 for key in properties]
        size = (max(1.4 * len(pairs) + 1.4, 4.6), 0.17 * sum(heights) + 0.42 * len(properties) + 0.6)
        drawing = Figure(figsize=size, layout="constrained")
        panels = drawing.subplots(
            len(properties), len(pairs), squeeze=False, sharex=True, sharey="row", height_ratios=heights
        )
        for row, key in zip(panels, properties, strict=True):
            for index, (axes, name) in enumerate(zip(row, pairs, strict=True)):
                _draw_shares(axes, labels[key], where[name].get(key, ()), look(name, index).color)
            row[0].set_yticks(range(len(labels[key])), [tick(label) for label in labels[key]], parse_math=False)
            row[0].set_ylim(len(labels[key]) - 0.4, -0.6)
            row[0].set_title(WHERE_TITLES[key], loc="left", fontsize=9, weight="bold")
        _finish(drawing, panels, pairs)
    return drawing


def _draw_shares(axes: Axes, labels: list[str], bins: Bins, color: str) -> None:
    axes.grid(visible=True, axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=8)
    if not bins:
        say(axes, "not known")
        return
    y = [labels.index(row.label) for row in bins]
    axes.barh([at - 0.2 for at in y], [row.contribution for row in bins], 0.4, color=color)
    axes.barh([at + 0.2 for at in y], [row.fraction_of_tokens for row in bins], 0.4, color=_TOKENS)


def _finish(drawing: Figure, panels: Any, pairs: list[str]) -> None:
    """What holds for all panels: names of the pairs, one scale, and what the two bars are."""
    for axes, name in zip(panels[0], pairs, strict=True):
        axes.annotate(
            tick(name),
            (0.5, 1.0),
            (0, 20),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=10,
            parse_math=False,
        )
    for axes in panels[-1]:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.set_xlabel("part in the bin")
    drawing.suptitle("upper bar: contribution to Σ d²   ·   lower bar, grey: fraction of tokens", fontsize=9)


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
