"""The error budget as a figure: both sides' errors against a reference, and the gap that they predict and make."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import plot_settings, tick
from mismatch_probe.report.format import clipped, number, visible
from mismatch_probe.report.matrix import diagonal_pairs, noise_floor
from mismatch_probe.types import MetricValue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from mismatch_probe.results.comparison import Comparison, Pair

_WIDTH = 0.2
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
                at = x + (k - 1.5) * _WIDTH
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
        x, height, _WIDTH, color=bar.color, hatch=bar.hatch, edgecolor="#222222", linewidth=0.7, label=label or None
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
    note = f"Errors against {reference}. A Hugging Face reference charges every difference of implementation to vLLM"
    gap = _float32_gap(summary)
    if gap is None:
        return f"{note}; no float32–float32 pair shows how large those are."
    return f"{note}; the float32–float32 gap shows how large those are where precision is not in question."
