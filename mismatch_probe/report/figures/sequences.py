"""Figures of sequences: their log ratios at lengths that were run and beyond, and along a recorded training run."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mismatch_probe.report.data import ReportData, dtype_order, modes_of, ordered_pairs, pair_label, steps_of
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import Look, look, plot_settings, say
from mismatch_probe.report.format import clipped, metric_title, visible
from mismatch_probe.report.model import in_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from mismatch_probe.metrics.groups import GroupResult
    from mismatch_probe.metrics.length_prediction import LengthForecast
    from mismatch_probe.results.comparison import Comparison
    from mismatch_probe.types import MetricValue

_GRID = "#e4e4e4"
_WHY_CHARACTERS, _WHY_WIDTH = 160, 60


@figure(
    "length",
    ReportData,
    "What longer responses do",
    "Markers are measured and bands are predicted; where a band falls below a dashed line, sequence weights leave "
    "less than that fraction of the samples.",
    "Two panels over the response length in tokens. First, the standard deviation of the sequence log ratio in nats, "
    "on logarithmic axes; second, the effective sample size as a fraction of the sequences, from 0 to 1. Open markers "
    "are measured; a line with a 95 % band for each dtype is predicted; filled markers show where it falls below 0.5 "
    "and 0.1.",
    needs=lambda data: bool(data.curves.forecast),
    order=7,
)
def length_figure(data: ReportData) -> Figure:
    """Left: standard deviation of D(L) against L. Right: `ess_seq`, and where it falls below a threshold.

    Markers are measured, over the sequences that reach a length; lines with 95 % bands are predicted, by dtype.
    """
    forecasts = data.curves.forecast
    with plot_settings():
        drawing = Figure(figsize=(5.2, 8.4), layout="constrained")
        left, right = drawing.subplots(2, 1)
        dtypes = dtype_order(forecasts)
        for index, dtype in enumerate(dtypes):
            _draw_curve(left, dtype, index, forecasts[dtype], "seq_log_ratio_std")
            _draw_curve(right, dtype, index, forecasts[dtype], "ess_seq")
        _finish_spread(left)
        _finish_ess(right, dtypes, forecasts)
        handles, labels = left.get_legend_handles_labels()
        if handles:
            drawing.legend(handles, labels, loc="outside upper center", ncols=1, frameon=False, handlelength=3.2)
        notes = [f"{visible(dtype)}: {why}" for dtype in dtypes if (why := _note(forecasts[dtype]))]
        if notes:
            drawing.supxlabel("\n".join(notes), fontsize=8, color="#555555", parse_math=False)
    return drawing


def _draw_curve(axes: Axes, dtype: str, index: int, forecast: LengthForecast, key: str) -> None:
    mark, measured = look(dtype, index), forecast.fit.measured
    seen = measured.std if key == "seq_log_ratio_std" else measured.ess
    drawable = (seen > 0) & (measured.length >= 4)
    axes.plot(
        measured.length[drawable],
        seen[drawable],
        mark.marker,
        color=mark.color,
        markersize=4,
        markerfacecolor="none",
        zorder=3,
    )
    length, value, low, high = _band(forecast, key)
    if not (value > 0).any():
        axes.plot([], [], color=mark.color, linestyle=mark.linestyle, label=_legend(dtype, forecast))
        return
    axes.plot(length, value, color=mark.color, linestyle=mark.linestyle, linewidth=1.8, label=_legend(dtype, forecast))
    axes.fill_between(length, low, high, color=mark.color, alpha=0.16, linewidth=0)
    axes.axvline(forecast.fit.observed_length, color=mark.color, linestyle=mark.linestyle, linewidth=0.7, alpha=0.6)


def _band(forecast: LengthForecast, key: str) -> tuple[NDArray[np.float64], ...]:
    """Length, value and limits of the curve's points that have a number."""
    rows = [
        (prediction.length, value.value, value.ci_low, value.ci_high)
        for prediction in forecast.curve
        if (value := prediction.values[key]).value is not None
    ]
    return tuple(np.array(rows, dtype=np.float64).reshape(-1, 4).T)


def _legend(dtype: str, forecast: LengthForecast) -> str:
    """The dtype with γ of Var D ~ L^γ and its crossings, e.g. `bfloat16: γ 0.97 [0.71, 1.3]; ESS < 0.5 at 156 …`."""
    exponent = forecast.fit.variance_exponent
    if exponent.value is None:
        return visible(dtype)
    parts = [f"γ {in_line(exponent, 2)}"]
    end = f"{forecast.curve[-1].length:,}" if forecast.curve else "–"
    parts += [f"ESS < {ess:g} {_says(crossing, end)}" for ess, crossing in forecast.crossings.items()]
    return f"{visible(dtype)}: " + ";\n".join(parts)


def _says(crossing: MetricValue, end: str) -> str:
    """Where it crosses, in tokens, with `>` for what lies beyond the last prediction."""
    low, value, high = (
        f">{end}" if limit is None else f"{limit:,.0f}" for limit in (crossing.ci_low, crossing.value, crossing.ci_high)
    )
    return f"at {value} tokens" if crossing.ci_low is None else f"at {value} [{low}, {high}] tokens"


def _note(forecast: LengthForecast) -> str:
    if forecast.fit.predictable and not forecast.fit.identical:
        return ""
    why = forecast.fit.why or forecast.fit.variance_exponent.why
    return textwrap.fill(clipped(visible(why), _WHY_CHARACTERS), _WHY_WIDTH)


def _has_points(axes: Axes) -> bool:
    """Whether anything can stand on logarithmic axes."""
    return any(np.size(line.get_xdata()) > 1 or np.size(line.get_ydata()) == 1 for line in axes.lines)


def _finish_spread(axes: Axes) -> None:
    axes.set(xlabel="response length L (tokens)", ylabel="standard deviation of log(π/μ) (nats)")
    if not _has_points(axes):
        say(axes, "nothing above 0 was measured")
        return
    axes.set(xscale="log", yscale="log")
    axes.set_title("open markers: measured; line and band: predicted", loc="left", fontsize=8, color="#555555")
    axes.grid(visible=True, color=_GRID, linewidth=0.6)


def _finish_ess(axes: Axes, dtypes: list[str], forecasts: Mapping[str, LengthForecast]) -> None:
    axes.set(xlabel="response length L (tokens)", ylabel="ESS, fraction of sequences", ylim=(0, 1.04))
    if not _has_points(axes):
        say(axes, "nothing measured")
        return
    axes.set_xscale("log")
    axes.set_title("filled: ESS falls below 0.5, 0.1; vertical: fitted length", loc="left", fontsize=8, color="#555555")
    axes.grid(visible=True, axis="y", color=_GRID, linewidth=0.6)
    end = max((forecast.curve[-1].length for forecast in forecasts.values() if forecast.curve), default=1)
    for threshold in sorted({ess for forecast in forecasts.values() for ess in forecast.crossings}, reverse=True):
        axes.axhline(threshold, color="#777777", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
        for index, dtype in enumerate(dtypes):
            crossing = forecasts[dtype].crossings.get(threshold)
            if crossing is not None:
                _mark(axes, threshold, crossing, look(dtype, index), end)


def _mark(axes: Axes, threshold: float, crossing: MetricValue, mark: Look, end: float) -> None:
    """A filled marker at the crossing, with its interval; an arrowhead at `end` where that has no upper limit."""
    if crossing.value is not None:
        axes.plot([crossing.value], [threshold], mark.marker, color=mark.color, markersize=7, zorder=4)
    if crossing.ci_low is None:
        return
    high = end if crossing.ci_high is None else crossing.ci_high
    axes.plot([crossing.ci_low, high], [threshold, threshold], color=mark.color, linewidth=2.2, zorder=3.5)
    if crossing.ci_high is None:
        axes.plot([end], [threshold], ">", color=mark.color, markersize=6, zorder=3.5)


_KEYS = ("mean_abs_logprob_diff", "kl_k3", "ess_seq")


def has_steps(summary: Comparison) -> bool:
    """Whether some pair of a recorded run has more than one training step."""
    return any(len(steps_of(pair)) > 1 for pair in summary.pairs)


@figure(
    "steps",
    ReportData,
    "The mismatch while the policy is trained",
    "Rounding neither grows with the steps nor falls when the engine is restarted.",
    "Three panels over the training step: mean |d| in nats, KL k3 in nats per token, and the effective sample size of "
    "sequence weights. One line with a 95 % band for each pair.",
    needs=lambda data: has_steps(data.summary),
    order=8,
)
def steps_figure(data: ReportData) -> Figure:
    """Mean |d|, k3 and ESS by training step, a line with its 95 % band per pair."""
    modes = modes_of(data.summary)
    pairs = [pair for pair in ordered_pairs(data.summary) if steps_of(pair)]
    with plot_settings():
        drawing = Figure(figsize=(6.8, 7.2), layout="constrained")
        panels = drawing.subplots(len(_KEYS), 1, sharex=True)
        for axes, key in zip(panels, _KEYS, strict=True):
            axes.set_ylabel(metric_title(key))
            axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
            for index, pair in enumerate(pairs):
                mark = look(pair.trainer_dtype, index)
                _draw(axes, steps_of(pair), key, mark, visible(pair_label(pair, modes)))
            if not axes.lines:
                say(axes, "no values")
            elif key != "ess_seq" and all((line.get_ydata() > 0).all() for line in axes.lines):
                axes.set_yscale("log")
        panels[-1].set_xlabel("training step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = panels[0].get_legend_handles_labels()
        if len(handles) > 1:
            drawing.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return drawing


def _draw(axes: Axes, steps: Sequence[GroupResult], key: str, mark: Look, label: str) -> None:
    found = [(int(step.label), step.metrics[key]) for step in steps]
    rows = [(at, v.value, v.ci_low, v.ci_high) for at, v in found if v.value is not None]
    if not rows:
        return
    at, value, low, high = np.array(rows, dtype=np.float64).T
    axes.plot(at, value, mark.marker, linestyle=mark.linestyle, color=mark.color, markersize=3.5, label=label)
    axes.fill_between(at, low, high, color=mark.color, alpha=0.2, linewidth=0)
