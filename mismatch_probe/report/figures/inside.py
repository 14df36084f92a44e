"""Figures of what lies inside the models: the residual stream by layer, what it would predict there, and routers."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mismatch_probe.metrics.inside import THRESHOLD
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import DIM, GRID, INK, limits_of, look, plot_settings, say
from mismatch_probe.report.format import clipped, number, percent, visible
from mismatch_probe.results.attribution import Attribution

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from mismatch_probe.metrics.inside import Inside, LayerRow
    from mismatch_probe.results.attribution import Experts, RouterLayer

_NOTE_WIDTH, _NAME_CHARACTERS, _WHY_CHARACTERS = 118, 20, 90
# Scores from here on are arrows at the upper edge.
_HIGHEST_SCORE = 1e3
_LINEAR_UP_TO = 8.0
_EDGE = "#b3261e"


def _has_layers(document: Attribution) -> bool:
    return bool(_dtypes(document))


@figure(
    "attribute-layers",
    of=Attribution,
    title="How the engines part with depth",
    guide="Above, a jump is a layer that adds more than others; below, only what lies in the shaded region is more "
    "than rounding.",
    alt="Two panels over the decoder layers, a line for each dtype. Above: relative error of the residual stream, "
    "logarithmic. Below: score of each layer's own step, with a line at the threshold.",
    needs=_has_layers,
    order=3,
)
def layers_figure(document: Attribution) -> Figure:
    """Relative error of the residual stream after each layer, and below it how far each layer's own step stands out."""
    found = _dtypes(document)
    with plot_settings():
        drawn = Figure(figsize=(9.6, 5.6), layout="constrained")
        upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=(1.5, 1.0))
        for index, (dtype, inside) in enumerate(found.items()):
            _line(upper, inside.layers, [row.relative_error for row in inside.layers], dtype, index)
        upper.set_ylabel("relative error of the\nresidual stream (RMS)")
        _log_scale(upper, "the engines do not differ")
        _draw_scores(lower, found)
        lower.set_xlabel("decoder layer")
        _finish(drawn, (upper, lower), _layers_note(document))
    return drawn


def _dtypes(document: Attribution) -> dict[str, Inside]:
    return {name: inside for name, inside in document.layers.dtypes.items() if inside.layers}


def _line(axes: Axes, layers: Sequence[LayerRow], found: Sequence[float | None], dtype: str, index: int) -> None:
    """What is not above zero has no place on a logarithmic axis."""
    mark = look(dtype, index)
    values = np.array([value or math.nan for value in found], dtype=np.float64)
    axes.plot(
        _depth(layers),
        values,
        color=mark.color,
        linestyle=mark.linestyle,
        marker=mark.marker,
        markersize=4,
        markevery=max(1, len(layers) // 30),
        linewidth=1.5,
        label=_name(dtype),
    )


def _depth(layers: Sequence[LayerRow | RouterLayer]) -> NDArray[np.float64]:
    return np.array([row.layer for row in layers], dtype=np.float64)


def _name(dtype: str) -> str:
    return clipped(visible(dtype), _NAME_CHARACTERS)


def _log_scale(axes: Axes, otherwise: str) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines])
    if np.isfinite(values).any():
        axes.set_yscale("log")
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        # A decade at least, so that there are ticks to read, and room for markers at the edges.
        room = max(1.25, math.sqrt(10.0 * low / high), (high / low) ** 0.05)
        axes.set_ylim(low / room, high * room)
    else:
        axes.set_yticks([])
        say(axes, otherwise)


def _draw_scores(axes: Axes, found: Mapping[str, Inside]) -> None:
    scores = [layer.score for inside in found.values() for layer in inside.layers]
    top = min(max(*scores, THRESHOLD), _HIGHEST_SCORE)
    if top > _LINEAR_UP_TO:
        axes.set(yscale="log", ylim=(0.2, 1.6 * top))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0.0, 1.15 * top)
    for index, (dtype, inside) in enumerate(found.items()):
        mark, depth = look(dtype, index), _depth(inside.layers)
        values = np.array([min(layer.score, top) for layer in inside.layers])
        # Hollow, since the dtypes' scores tend to lie on each other.
        style: dict[str, Any] = {"marker": mark.marker, "linestyle": mark.linestyle, "linewidth": 0.7, "markersize": 5}
        axes.plot(depth, values, color=mark.color, markerfacecolor="none", label=_name(dtype), **style)
        beyond = np.array([layer.score for layer in inside.layers]) > top
        axes.plot(depth[beyond], np.full(beyond.sum(), 1.25 * top), "^", color=mark.color, markersize=6)
    axes.axhspan(THRESHOLD, axes.get_ylim()[1], color="#f6e3e1", linewidth=0, zorder=0)
    axes.axhline(THRESHOLD, color=_EDGE, linewidth=1.1)
    axes.annotate(
        f"{THRESHOLD:g}: more than rounding explains",
        (0.0, THRESHOLD),
        (4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color=_EDGE,
    )
    axes.set_ylabel("score of the layer's step\n(distance / rounding)")


def _layers_note(document: Attribution) -> str:
    layers = document.layers
    shift = layers.eager_vs_compiled_shift
    notes = [] if layers.rollout_eager else ["Layers are recorded in eager mode; the rollout did not run in it."]
    if shift is not None and shift.value is not None:
        notes.append(f"RMS between eager and compiled log-probs: {number(shift.value)} nats.")
    for name, inside in layers.dtypes.items():
        if not inside.layers:
            notes.append(f"{_name(name)} is missing: {clipped(visible(inside.why), _WHY_CHARACTERS)}")
    return " ".join(notes)


def _has_lens(document: Attribution) -> bool:
    return any(layer.lens_kl for inside in _dtypes(document).values() for layer in inside.layers)


@figure(
    "attribute-lens",
    of=Attribution,
    title="What the residual streams would predict",
    guide="Where a line rises, the engines' next-token predictions come apart at that depth.",
    alt="KL divergence of both sides' logit lens over the decoder layers, logarithmic, a line for each dtype.",
    needs=_has_lens,
    order=4,
)
def lens_figure(document: Attribution) -> Figure:
    """KL of what both models would predict from the residual stream after each layer."""
    with plot_settings():
        drawn = Figure(figsize=(9.6, 3.6), layout="constrained")
        axes = drawn.add_subplot()
        for index, (dtype, inside) in enumerate(_dtypes(document).items()):
            found = [layer.lens_kl for layer in inside.layers]
            if any(found):
                _line(axes, inside.layers, found, dtype, index)
        _log_scale(axes, "the engines do not differ")
        axes.set(xlabel="decoder layer", ylabel="KL(rollout‖trainer) of the logit lens\n(nats per position)")
        _finish(drawn, (axes,), "")
    return drawn


def _finish(drawn: Figure, panels: Sequence[Axes], note: str) -> None:
    for axes in panels:
        axes.grid(visible=True, color=GRID, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    handles, labels = panels[0].get_legend_handles_labels()
    legend = drawn.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, handlelength=3.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    if note:
        drawn.supxlabel(textwrap.fill(note, _NOTE_WIDTH), fontsize=8, color=DIM, parse_math=False)


def _has_experts(document: Attribution) -> bool:
    return document.experts is not None and bool(document.experts.layers)


@figure(
    "attribute-experts",
    of=Attribution,
    title="Where the routers disagree",
    guide="Left, a low layer is one whose router is easily tipped; right, the gap that is left without disagreement.",
    alt="Left: fraction of tokens for which both routers choose the same experts, over the decoder layers. Right: RMS "
    "of the gap with the trainer's own routes and with the engine's, with intervals.",
    needs=_has_experts,
    order=6,
)
def experts_figure(document: Attribution) -> Figure:
    """How often both routers choose the same experts, and the gap with the trainer's own routes and the engine's."""
    experts = document.experts
    assert experts is not None
    with plot_settings():
        drawn = Figure(figsize=(9.6, 3.8), layout="constrained")
        left, right = drawn.subplots(1, 2, width_ratios=(1.8, 1.0))
        layers = experts.layers
        agreement = np.array([row.agreement for row in layers], dtype=np.float64)
        left.plot(_depth(layers), agreement, "-o", color="#1f5fa8", markersize=4, linewidth=1.4)
        left.set_ylim(min(0.9, float(agreement.min()) - 0.02), 1.004)
        left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        left.set(xlabel="decoder layer", ylabel="tokens for which both routers\nchoose the same experts")
        text = f"{percent(experts.flipped_tokens)} of the tokens differ in some layer"
        left.set_title(text, loc="left", fontsize=8, color=DIM)
        left.grid(visible=True, color=GRID, linewidth=0.6)
        _draw_routes(right, experts)
    return drawn


def _draw_routes(axes: Axes, experts: Experts) -> None:
    own, engine = experts.own_routes, experts.engine_routes
    assert own is not None
    assert engine is not None
    known = [
        ("the trainer's\nown routes", own.rms, "o", "#1f5fa8"),
        ("the engine's\nroutes", engine.rms, "s", "#d95f02"),
    ]
    highest = 0.0
    for x, (_, metric, marker, color) in enumerate(known):
        value, ends = metric.value, limits_of(metric)
        if value is None:
            axes.text(x, 0.5, "–", transform=axes.get_xaxis_transform(), ha="center")
            continue
        top = value if ends is None else min(ends[1], 3.0 * value)
        if ends is not None:
            axes.vlines(x, max(ends[0], 0.0), top, color=color, linewidth=1.4)
        axes.plot([x], [value], marker, color=color, markersize=7)
        axes.annotate(number(value), (x, value), (8, 0), textcoords="offset points", va="center", fontsize=8)
        highest = max(highest, top)
    axes.set_xticks(range(len(known)), [name for name, *_ in known], fontsize=8.5)
    axes.set(xlim=(-0.5, 1.7), ylim=(0.0, 1.1 * highest or 1.0), ylabel="RMS of the gap to prefill (nats)")
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)
    ratio = engine.rms_ratio.value
    if ratio is not None:
        axes.set_title(f"the engine's routes leave {percent(ratio)}", loc="left", fontsize=8, color=DIM)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
