"""The figures of an audit: pure functions from its document to a Figure, which compute nothing but layout.

The range of FP16 is what they show against: its largest number above activations, what it flushes and overflows beside
gradients, and the distance between its numbers as the unit of a weight's motion.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.floats import FP16
from mismatch_probe.report import words
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import Look, look, plot_settings, say
from mismatch_probe.report.format import clipped, visible
from mismatch_probe.results.audit import Audit
from mismatch_probe.results.ranges import Activations, LagCase, WeightMotion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray


_GRID, _BEYOND, _EDGE = "#e4e4e4", "#eceff3", "#b3261e"
_LAYERS = {
    "first_token_peak": ("first token, largest", Look("#111111", "-", "o")),
    "rest_peak": ("other tokens, largest", Look("#d95f02", "--", "s")),
    "rest_p999": ("other tokens, 99.9 %", Look("#1f5fa8", "-.", "^")),
    "rest_median": ("other tokens, median", Look("#888888", ":", "v")),
}
_CONTEXTS = {
    "peak": ("any tensor", Look("#111111", "-", "o")),
    "residual": ("residual stream", Look("#d95f02", "--", "s")),
}
_SIDES = {
    "weight": ("gradients of weights", Look("#1f5fa8", "-", "o")),
    "activation": ("gradients of activations", Look("#d95f02", "--", "s")),
}
_MARKERS = ("X", "o", "s", "^", "D", "v")
# Σ|g| below this fraction of all is not worth a decade of the axis.
_LEAST_SHARE = 1e-8
_NAME_CHARACTERS, _TITLE_CHARACTERS = 20, 130


@figure(
    "range",
    Audit,
    "Activations against FP16's largest number",
    "FP16 has no number for a line in the shaded region. Right of the vertical line nothing was seen.",
    "Two panels on logarithmic axes. Left: largest, 99.9 % and median |activation| of the residual stream by decoder "
    "layer, first tokens apart. Right: largest |activation| by tokens of context. A horizontal line marks FP16's "
    "largest number, 65,504.",
    needs=lambda audit: audit.range.forward is not None,
)
def range_figure(audit: Audit) -> Figure:
    """Peak |activation| by decoder layer and by context length, against FP16's largest number."""
    forward = audit.range.forward
    assert forward is not None
    with plot_settings():
        drawn = Figure(figsize=(10.0, 4.6), layout="constrained")
        left, right = drawn.subplots(1, 2)
        _draw_layers(left, forward)
        _draw_contexts(right, forward)
        for axes in (left, right):
            axes.grid(visible=True, color=_GRID, linewidth=0.6)
    return drawn


def _draw_layers(axes: Axes, forward: Activations) -> None:
    rows = forward.residual_by_layer
    axes.set(xlabel="decoder layer", ylabel="|activation| of the residual stream, per token")
    if not _finish_peaks(axes, [getattr(row, key) for row in rows for key in _LAYERS]):
        say(axes, "no residual stream was seen")
        return
    x = np.array([row.layer for row in rows], dtype=np.float64)
    for key, (label, mark) in _LAYERS.items():
        _line(axes, x, _positive([getattr(row, key) for row in rows]), mark, label)
    residual = [row for row in forward.tensors if row.kind == "residual"]
    broken = sorted({row.layer for row in residual if row.n_nonfinite and row.layer is not None})
    if broken:
        label = "not finite even in FP32"
        axes.plot(broken, np.full(len(broken), axes.get_ylim()[1] / 2), "x", color=_EDGE, markersize=7, label=label)
    _say_limit(axes, f"{FP16.largest:.0f}, FP16's largest number", (0.0, FP16.largest), "axes fraction")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(frameon=False, fontsize=8, handlelength=3.2)


def _draw_contexts(axes: Axes, forward: Activations) -> None:
    rows, longest = forward.by_context, forward.longest
    axes.set(xlabel="tokens of context, the token itself included", ylabel="largest |activation|")
    if not _finish_peaks(axes, [getattr(row, key) for row in rows for key in _CONTEXTS]):
        say(axes, "no token was seen")
        return
    spans = [(row.first + 1, min(row.last + 1, longest)) for row in rows]
    for key, (label, mark) in _CONTEXTS.items():
        values = _positive([getattr(row, key) for row in rows])
        _line(axes, np.array([math.sqrt(low * high) for low, high in spans]), values, mark, label)
        for (low, high), value in zip(spans, values, strict=True):
            axes.plot([low, high], [value, value], color=mark.color, linewidth=0.8, alpha=0.7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(0.8, longest * max(4.0, longest**0.35))
    axes.axvspan(longest, axes.get_xlim()[1], color=_BEYOND, linewidth=0, zorder=0)
    axes.axvline(longest, color="#555555", linewidth=1.0)
    axes.annotate(
        f"nothing is known\nbeyond\n{longest:,} tokens",
        (longest, 0.0),
        (5, 8),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=8,
    )
    # Where no curve can be.
    _say_limit(axes, f"{FP16.largest:.0f}, FP16's\nlargest number", (longest, FP16.largest), "data")
    axes.legend(frameon=False, fontsize=8, handlelength=3.2)


def _finish_peaks(axes: Axes, values: Sequence[float | None]) -> bool:
    """A logarithmic axis that holds FP16's largest number, and whether anything can stand on it."""
    positive = [value for value in values if value]
    if not positive:
        return False
    top = max(*positive, FP16.largest)
    axes.set_yscale("log")
    axes.set_ylim(min(positive) / 2.0, top * 8.0)
    axes.axhspan(FP16.largest, top * 8.0, color="#f6d9d6", linewidth=0, zorder=0)
    axes.axhline(FP16.largest, color=_EDGE, linewidth=1.1)
    return True


def _say_limit(axes: Axes, text: str, at: tuple[float, float], across: str) -> None:
    axes.annotate(text, at, (5, 3), xycoords=(across, "data"), textcoords="offset points", fontsize=8, color=_EDGE)


@figure(
    "gradients",
    Audit,
    "Gradients against what FP16 keeps",
    "Σ|g| left of a bar becomes 0, and a gradient right of it infinite. A loss scale moves the bar to the left.",
    "Fraction of Σ|g| by gradient magnitude, on logarithmic axes: one line for gradients of weights, one for gradients "
    "of activations. Bars above span the magnitudes that FP16 keeps, without a loss scale and with one.",
    needs=lambda audit: audit.range.backward is not None,
    order=1,
)
def gradients_figure(audit: Audit) -> Figure:
    """Σ|g| by binary exponent, as a fraction of each side's, against what FP16 keeps without and with a loss scale."""
    backward, recommendation = audit.range.backward, audit.recommendation
    assert backward is not None
    scale = None if recommendation is None else recommendation.loss_scale
    exponent = round(math.log2(scale)) if scale else backward.start_exponent
    with plot_settings():
        drawn = Figure(figsize=(9.6, 5.0), layout="constrained")
        strip, axes = drawn.subplots(2, 1, sharex=True, height_ratios=(0.22, 1.0))
        strip.set_axis_off()
        title = textwrap.fill(visible(words.say(backward.loss_scales())), _TITLE_CHARACTERS)
        strip.set_title(title, loc="left", fontsize=8, parse_math=False)
        axes.set(xlabel="gradient magnitude |g|, without a loss scale", ylabel="fraction of Σ|g|")
        shown = [_draw_mass(axes, backward.mass_by_exponent[side], *_SIDES[side]) for side in _SIDES]
        seen = [x for ends in shown if ends is not None for x in ends]
        if not seen:
            axes.set(xticks=[], yticks=[])
            say(axes, "no tensor got a gradient")
            return drawn
        axes.set(yscale="log", ylim=(_LEAST_SHARE, 2.0))
        bare, scaled = _kept(0), _kept(exponent)
        axes.set_xlim(min(scaled[0], bare[0], *seen) - 6, max(scaled[1], bare[1], *seen) + 6)
        word = "recommended" if scale else "usual first"
        _draw_window(strip, axes, bare, "FP16 keeps these without a loss scale", 0.72, "-")
        _draw_window(strip, axes, scaled, f"and these at the {word} one, $2^{{{exponent}}}$", 0.22, "--")
        axes.axvspan(axes.get_xlim()[0], bare[0], color=_BEYOND, linewidth=0, zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.xaxis.set_major_formatter(lambda value, _: f"$2^{{{value:.0f}}}$")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.6)
        drawn.legend(loc="outside lower center", ncols=len(_SIDES), frameon=False, fontsize=8, handlelength=3.2)
    return drawn


def _draw_mass(axes: Axes, rows: Sequence[tuple[int, float]], label: str, mark: Look) -> tuple[float, float] | None:
    """Draws a side's fractions and returns the exponents between which they are visible."""
    total = math.fsum(mass for _, mass in rows)
    if not total:
        return None
    exponents = np.array([exponent for exponent, _ in rows], dtype=np.float64)
    shares = np.array([mass / total for _, mass in rows])
    # A bin holds [2^e, 2^(e+1)), so that its middle is half an exponent up.
    _line(axes, exponents + 0.5, shares, mark, label)
    shown = exponents[shares >= _LEAST_SHARE]
    return float(shown.min()), float(shown.max() + 1)


def _kept(exponent: int) -> tuple[float, float]:
    """log2 of the magnitudes between which FP16 neither flushes nor overflows at a loss scale of 2^exponent."""
    return math.log2(FP16.flushes_up_to) - exponent, math.log2(FP16.overflows_from) - exponent


def _draw_window(strip: Axes, axes: Axes, edges: tuple[float, float], text: str, y: float, dash: str) -> None:
    """A bar in the strip over the magnitudes that FP16 keeps, with a line through the panel below each end."""
    strip.set_ylim(0.0, 1.0)
    strip.plot(edges, (y, y), color="#333333", linewidth=1.4, linestyle=dash, marker="|", markersize=9)
    strip.text(sum(edges) / 2, y + 0.06, text, ha="center", va="bottom", fontsize=8)
    for x, word, side in ((edges[0], "0  ", "right"), (edges[1], "  ∞", "left")):
        strip.text(x, y, word, ha=side, va="center", fontsize=9, color=_EDGE)
        axes.axvline(x, color="#333333", linewidth=1.0, linestyle=dash)


@figure(
    "lag",
    Audit,
    "What the engine does not see of a step",
    "Left, how small a step is beside the distance of the engine's numbers (a larger move counts as one). Right, what "
    "the difference between FP32 masters and their 16-bit copy does to log-probs, with 95 % intervals.",
    "Left: mean move of a weight in a step by decoder layer, in units in the last place of the engine's dtype, a line "
    "for each dtype and learning rate. Right: mean |d| in nats with intervals, by where the masters are, a colour for "
    "each dtype.",
    needs=lambda audit: audit.range.lag is not None,
    order=2,
)
def lag_figure(audit: Audit) -> Figure:
    """Motion of FP32 masters a step, in units of the engine's numbers, and what their lag does to log-probs."""
    lag = audit.range.lag
    assert lag is not None
    rows = [row for row in (() if lag.motion is None else lag.motion.rows) if row.by_layer]
    cases = lag.cases
    places = list(dict.fromkeys((*(case.rate for case in cases), *(row.rate for row in rows))))
    markers = {rate: _MARKERS[i % len(_MARKERS)] for i, rate in enumerate(sorted(places, key=lambda r: r or 0.0))}
    with plot_settings():
        drawn = Figure(figsize=(10.0, 4.6), layout="constrained")
        left, right = drawn.subplots(1, 2, width_ratios=(1.6, 1.0))
        _draw_motion(left, rows, markers)
        _draw_cases(right, cases, markers)
        for axes in (left, right):
            axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.6)
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                columns = len({row.dtype for row in rows}) if axes is left else 1
                legend = axes.legend(
                    handles, labels, loc="upper left", ncols=columns, frameon=False, fontsize=8, handlelength=3.2
                )
                for text in legend.get_texts():
                    text.set_parse_math(False)
    return drawn


def _draw_motion(axes: Axes, rows: Sequence[WeightMotion], markers: Mapping[float | None, str]) -> None:
    axes.set(xlabel="decoder layer", ylabel="mean |Δw| of a step (ulp of the engine)")
    moved = [layer.steady_ulp for row in rows for layer in row.by_layer if layer.steady_ulp]
    if not moved:
        say(axes, "no weight moved" if rows else "no motion by layer was measured")
        return
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for row in rows:
        mark = look(row.dtype, dtypes.index(row.dtype))
        x = np.array([layer.layer for layer in row.by_layer], dtype=np.float64)
        y = _positive([layer.steady_ulp for layer in row.by_layer])
        label = f"{_name(row.dtype)} engine, rate {row.rate:g}"
        _line(axes, x, y, Look(mark.color, mark.linestyle, markers[row.rate]), label)
    # Room for the legend above the highest line.
    axes.set(yscale="log", ylim=(min(moved) / 2, max(1.0, *moved) * 6 * 1.6 ** len(markers)))
    axes.axhline(1.0, color="#777777", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        "1 ulp: the distance between two of the engine's numbers",
        (0.0, 1.0),
        (4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color="#555555",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _draw_cases(axes: Axes, cases: Sequence[LagCase], markers: Mapping[float | None, str]) -> None:
    """Mean |d| of masters against their 16-bit copy, with its interval, by where the masters are."""
    axes.set_ylabel("mean |d|, masters against engine (nats)")
    known = [(case, value) for case in cases if (value := case.mean_abs_logprob_diff.value)]
    if not known:
        say(axes, "no gap above 0")
        return
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    rates = list(dict.fromkeys(case.rate for case in cases))
    axes.set_yscale("log")
    highest = 0.0
    for case, value in known:
        gap, index = case.mean_abs_logprob_diff, dtypes.index(case.dtype)
        mark = look(case.dtype, index)
        x = rates.index(case.rate) + 0.24 * (index - (len(dtypes) - 1) / 2)
        if gap.ci_low is not None and gap.ci_high is not None:
            ends = (max(gap.ci_low, value / 100), gap.ci_high)
            axes.vlines(x, *ends, color=mark.color, linewidth=1.4, linestyle=mark.linestyle)
        highest = max(highest, value, gap.ci_high or 0.0)
        axes.plot([x], [value], markers[case.rate], color=mark.color, markersize=6)
    for index, dtype in enumerate(dtypes):
        mark = look(dtype, index)
        axes.plot([], [], color=mark.color, linestyle=mark.linestyle, label=_name(dtype))
    names = ["steady" if rate is None else f"first step\nat {rate:g}" for rate in rates]
    axes.set_xticks(range(len(rates)), names)
    axes.set_xlim(-0.6, len(rates) - 0.4)
    axes.set_ylim(top=3 * highest)  # room for the legend


def _name(dtype: str) -> str:
    return clipped(visible(dtype_label(dtype)), _NAME_CHARACTERS)


def _line(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], mark: Look, label: str) -> None:
    axes.plot(
        x,
        y,
        color=mark.color,
        linestyle=mark.linestyle,
        marker=mark.marker,
        markersize=4,
        markevery=max(1, len(x) // 20),
        linewidth=1.4,
        label=label,
    )


def _positive(values: Sequence[float | None]) -> NDArray[np.float64]:
    """NaN, which is not drawn, for what has no place on a logarithmic axis."""
    return np.array([value if value else math.nan for value in values], dtype=np.float64)
