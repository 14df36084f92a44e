"""The mismatch of a recorded training run against its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import Look, look, plot_settings, say
from mismatch_probe.report.format import visible
from mismatch_probe.report.matrix import modes_of, ordered_pairs, pair_label
from mismatch_probe.report.names import metric_title

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.steps import StepResult
    from mismatch_probe.results.comparison import Comparison

_KEYS = ("mean_abs_logprob_diff", "kl_k3", "ess_seq")


def has_steps(summary: Comparison) -> bool:
    """Whether some pair of a recorded run has more than one training step."""
    return any(len(pair.steps) > 1 for pair in summary.pairs)


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
    pairs = [pair for pair in ordered_pairs(data.summary) if pair.steps]
    with plot_settings():
        drawing = Figure(figsize=(6.8, 7.2), layout="constrained")
        panels = drawing.subplots(len(_KEYS), 1, sharex=True)
        for axes, key in zip(panels, _KEYS, strict=True):
            axes.set_ylabel(metric_title(key))
            axes.grid(visible=True, axis="y", color="#e4e4e4", linewidth=0.6)
            for index, pair in enumerate(pairs):
                mark = look(pair.trainer_dtype, index)
                _draw(axes, pair.steps, key, mark, visible(pair_label(pair, modes)))
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


def _draw(axes: Axes, steps: Sequence[StepResult], key: str, mark: Look, label: str) -> None:
    found = [(step.step, step.metrics[key]) for step in steps]
    rows = [(at, v.value, v.ci_low, v.ci_high) for at, v in found if v.value is not None]
    if not rows:
        return
    at, value, low, high = np.array(rows, dtype=np.float64).T
    axes.plot(at, value, mark.marker, linestyle=mark.linestyle, color=mark.color, markersize=3.5, label=label)
    axes.fill_between(at, low, high, color=mark.color, alpha=0.2, linewidth=0)
