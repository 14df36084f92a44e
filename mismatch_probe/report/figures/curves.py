"""The figures of a report: pure functions from curves and summaries to a Figure, which compute nothing but layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mismatch_probe.report.figures import save
from mismatch_probe.report.figures.budget import budget_figure, has_budget
from mismatch_probe.report.figures.exact import exact_figure
from mismatch_probe.report.figures.heatmap import matrix_figure
from mismatch_probe.report.figures.length import length_figure
from mismatch_probe.report.figures.policy import policy_figure
from mismatch_probe.report.figures.share import has_shares, share_figure
from mismatch_probe.report.figures.steps import has_steps, steps_figure
from mismatch_probe.report.figures.style import empty_figure, look, plot_settings, say
from mismatch_probe.report.format import visible
from mismatch_probe.report.matrix import dtype_order, has_exact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.curves import BinnedDiff, Ccdf
    from mismatch_probe.report.data import ReportData
    from mismatch_probe.results.comparison import Comparison

__all__ = [
    "FIGURES",
    "budget_figure",
    "ccdf_figure",
    "draw_all",
    "exact_figure",
    "length_figure",
    "matrix_figure",
    "policy_figure",
    "share_figure",
    "steps_figure",
    "where_figure",
]

FIGURES: dict[str, str] = {
    name: f"{name}.png" for name in ("policy", "ccdf", "matrix", "exact", "budget", "where", "share", "length", "steps")
}
"""File of each figure that a report can have; those in `draw_all`'s answer are the ones that it has."""


def ccdf_figure(ccdf: Mapping[str, Ccdf]) -> Figure:
    """The share of tokens whose |d| is at least x, for all dtypes in one log-log panel."""
    with plot_settings():
        if not ccdf:
            return empty_figure(Figure(figsize=(6.0, 2.0)), "No pair of equal dtypes was compared.")
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="|d| = |log π − log μ| of a token (nats)",
            ylabel="share of tokens with |d| ≥ x",
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
    return figure


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


def where_figure(by_probability: Mapping[str, BinnedDiff], by_position: Mapping[str, BinnedDiff]) -> Figure:
    """Mean |d| by the token's rollout probability and by its position in the response, with 95 % bands."""
    with plot_settings():
        if not by_probability and not by_position:
            return empty_figure(Figure(figsize=(6.0, 2.0)), "No pair of equal dtypes was compared.")
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_by_probability(left, by_probability)
        _draw_by_position(right, by_position)
        left.set_ylabel("mean |d| (nats)")
        _limit_to_means(left, [*by_probability.values(), *by_position.values()])
        for axes in (left, right):
            axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
        handles, labels = (left if by_probability else right).get_legend_handles_labels()
        if handles:
            figure.legend(
                handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, handlelength=3.2
            )
    return figure


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


def draw_all(data: ReportData, folder: Path) -> dict[str, Path]:
    """Write the figures of `FIGURES` into `folder` as PNG, each by atomic rename, and return where they are.

    Those that need full rows of logits, a reference or sorted tokens are drawn where the run has them; the others
    always, and say why where they stay empty. The files carry no date and no version, so equal data gives equal bytes
    with one matplotlib.

    Raises:
        DiskFull: No space is left on the device.
        TableError: A file cannot be written.
    """
    curves = data.curves
    drawings: dict[str, Callable[[], Figure]] = {
        "policy": lambda: policy_figure(curves.density, curves.length),
        "ccdf": lambda: ccdf_figure(curves.ccdf),
        "matrix": lambda: matrix_figure(data.summary),
        "exact": lambda: exact_figure(data.summary),
        "budget": lambda: budget_figure(data.summary),
        "where": lambda: where_figure(curves.by_probability, curves.by_position),
        "share": lambda: share_figure(data.summary.where),
        "length": lambda: length_figure(curves.forecast),
        "steps": lambda: steps_figure(data.summary),
    }
    needs: dict[str, Callable[[Comparison], bool]] = {
        "exact": has_exact,
        "budget": has_budget,
        "share": has_shares,
        "length": lambda _: bool(curves.forecast),
        "steps": has_steps,
    }
    drawn = [name for name in FIGURES if name not in needs or needs[name](data.summary)]
    return {name: save(drawings[name](), folder / FIGURES[name]) for name in drawn}
