"""Figures of the curves of a comparison: how many tokens differ by how much, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import look, plot_settings, say
from mismatch_probe.report.format import visible
from mismatch_probe.report.matrix import dtype_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.curves import BinnedDiff, Ccdf


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
