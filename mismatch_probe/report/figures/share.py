"""Which tokens the squared gap comes from: their contribution to Σ d² beside their fraction of all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mismatch_probe.report.data import ReportData
from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import look, plot_settings, say, tick
from mismatch_probe.report.matrix import dtype_order
from mismatch_probe.report.names import WHERE_TITLES, bin_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.where import WhereBin
    from mismatch_probe.results.comparison import Comparison

    Bins = Sequence[WhereBin]

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
