"""The figure of `rl gradient`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import Look, look, plot_settings, say
from mismatch_probe.report.format import visible
from mismatch_probe.results.gradient import Gradient

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.gradient import GradientMetrics
    from mismatch_probe.types import MetricValue

_GRID = "#e4e4e4"
_PANELS: dict[str, Callable[[GradientMetrics], MetricValue]] = {
    "cosine with the reference": lambda metrics: metrics.cosine,
    "effective batch, fraction of sequences": lambda metrics: metrics.effective_batch,
}
# Of the room between two corrections, what the marks of one take.
_WIDTH = 0.64


@figure(
    "gradient",
    Gradient,
    "What each correction does to the gradient",
    "Higher is better: at 1, the estimate points where the reference does, and the batch loses nothing.",
    "Two panels over the corrections: above, the cosine of each estimate with the reference; below, its effective "
    "batch as a fraction of the sequences. One marker shape and colour for each rollout dtype, with a bar for its 95 % "
    "interval; filled where the weights are those of the rollout's own dtype, open where they are the FP32 trainer's. "
    "A dashed line marks 1.",
)
def gradient_figure(document: Gradient) -> Figure:
    """Cosine and effective batch, by correction."""
    corrections = list(dict.fromkeys(one.correction for found in document.passes for one in found.estimates))
    with plot_settings():
        drawing = Figure(figsize=(5.6, 6.4), layout="constrained")
        panels = dict(zip(_PANELS, drawing.subplots(2, 1, sharex=True), strict=True))
        for title, axes in panels.items():
            drawn = _draw(axes, document, corrections, _PANELS[title])
            axes.set(ylabel=title)
            axes.axhline(1.0, color="#777777", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
            axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.6)
            if drawn:
                # An interval of few prompts can be longer than everything else; it runs out of the panel then.
                lowest = min(drawn)
                bottom = max(axes.get_ylim()[0], lowest - max(0.02, (1 - lowest) / 2))
                axes.set_ylim(bottom, 1 + 0.08 * (1 - bottom))  # neither can exceed 1
            else:
                say(axes, "nothing finite was measured")
        axes.set_xticks(range(len(corrections)), corrections, rotation=30, ha="right", rotation_mode="anchor")
        found = dict(zip(*reversed(next(iter(panels.values())).get_legend_handles_labels()), strict=True))
        if found:
            drawing.legend(found.values(), found, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return drawing


def _draw(
    axes: Axes, document: Gradient, corrections: list[str], metric: Callable[[GradientMetrics], MetricValue]
) -> list[float]:
    """Draws one metric and returns its values."""
    slots = [(found.rollout_pass, own) for found in document.passes for own in (True, False)]
    drawn = []
    for index, found in enumerate(document.passes):
        mark = look(found.rollout_dtype, index)
        for one in found.estimates:
            value, own = metric(one.metrics), found.own(one)
            if value.value is None:
                continue
            slot = slots.index((found.rollout_pass, own))
            x = corrections.index(one.correction) + _WIDTH * ((slot + 0.5) / len(slots) - 0.5)
            weights = "own weights" if own else "FP32 trainer's weights"
            _mark(axes, x, value, mark, own, f"{visible(found.rollout_dtype)}, {weights}")
            drawn.append(value.value)
    return drawn


def _mark(axes: Axes, x: float, value: MetricValue, mark: Look, filled: bool, label: str) -> None:
    assert value.value is not None
    if value.ci_low is not None and value.ci_high is not None:
        axes.vlines(x, value.ci_low, value.ci_high, color=mark.color, linewidth=1.2)
    axes.plot(
        [x],
        [value.value],
        mark.marker,
        color=mark.color,
        markerfacecolor=mark.color if filled else "white",
        markersize=6,
        label=label,
        zorder=3,
    )
