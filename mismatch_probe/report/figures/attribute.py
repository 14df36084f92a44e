"""The figures of an attribution: pure functions from its document to a Figure, which compute nothing but layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT
from matplotlib.ticker import MaxNLocator

from mismatch_probe.report.attribute_rows import (
    DIM,
    INK,
    SIDES,
    beside,
    bounds_of,
    heading_beside,
    limits_of,
    name_rows,
    ratio_axis,
    row_label,
    value_of,
    whisker,
)
from mismatch_probe.report.attribute_words import class_names, fix_wanted, order_of, share_percent, share_percents
from mismatch_probe.report.figures import save
from mismatch_probe.report.figures.inside import (
    experts_figure,
    has_experts,
    has_layers,
    has_lens,
    layers_figure,
    lens_figure,
)
from mismatch_probe.report.figures.style import plot_settings
from mismatch_probe.report.format import NONE, interval, number, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Document = Mapping[str, Any]

_ADDS, _UNDOES = "#5b8fc9", "#f0b277"
# Ends of intervals further than this from every share are arrows at the edge.
_ROOM = 0.5
# Points right of a panel.
_RMS_COLUMN, _TIME_COLUMN = 158, 134


def draw_attribution(document: Document, folder: Path) -> dict[str, Path]:
    """Writes the figures that the document has data for as PNG, and returns where they are, by name.

    Raises:
        DiskFull: No space is left on the device.
        TableError: A file cannot be written.
    """
    drawings: dict[str, tuple[Callable[[Document], bool], Callable[[Document], Figure]]] = {
        "ladder": (has_ladder, ladder_figure),
        "knobs": (has_knobs, knobs_figure),
        "layers": (has_layers, layers_figure),
        "lens": (has_lens, lens_figure),
        "fixes": (has_fixes, fixes_figure),
        "experts": (has_experts, experts_figure),
    }
    return {
        f"attribute-{name}": save(draw(document), folder / f"{name}.png")
        for name, (has, draw) in drawings.items()
        if has(document)
    }


def has_ladder(document: Document) -> bool:
    """Whether every rung has a share."""
    rungs = document["ladder"]["rungs"]
    return bool(rungs) and all(value_of(rung["share"]) is not None for rung in rungs)


def ladder_figure(document: Document) -> Figure:
    """Shares of E[d²] rung by rung, each from where the one before ended; below, each level's error against FP32."""
    rungs = document["ladder"]["rungs"]
    anchor = [row for row in document["ladder"]["anchor"] if value_of(row["error_rms"]) is not None]
    heights = (len(rungs) + 1.2, 0.7 * len(anchor) + 0.2) if anchor else (len(rungs) + 1.2,)
    with plot_settings():
        figure = Figure(figsize=(9.6, 0.42 * sum(heights) + 0.7 * len(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_rungs(panels[0], rungs)
        if anchor:
            _draw_anchor(panels[1], anchor)
    return figure


def _draw_rungs(axes: Axes, rungs: Sequence[Document]) -> None:
    names = [row_label(rung["change"]) for rung in rungs]
    name_rows(axes, range(len(rungs) + 1), [*names, "all of the gap"])
    starts, levels, whiskers = [], [0.0], []
    for rung in rungs:
        starts.append(levels[-1])
        levels.append(levels[-1] + rung["share"]["value"])
        ends = limits_of(rung["share"])
        whiskers.append(None if ends is None else (starts[-1] + ends[0], starts[-1] + ends[1]))
    low, high = bounds_of([*levels, 1.0], [end for ends in whiskers if ends for end in ends], _ROOM)
    axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    for y, (rung, start, ends) in enumerate(zip(rungs, starts, whiskers, strict=True)):
        share = rung["share"]["value"]
        color, hatch = (_ADDS, "") if share >= 0 else (_UNDOES, "////")
        axes.barh(y, share, 0.56, start, color=color, hatch=hatch, edgecolor=INK, linewidth=0.7)
        axes.vlines(start + share, y - 0.28, y + 1.28, color=INK, linewidth=0.7)
        if ends is not None:
            whisker(axes, y, ends, "black")
        beside(axes, y, share_percent(share), 10, weight="bold")
        beside(axes, y, share_percents(rung["share"]), 58)
        beside(axes, y, _with_limits(rung["rms"]), _RMS_COLUMN)
    axes.barh(len(rungs), levels[-1], 0.56, color="#cfd4da", edgecolor=INK, linewidth=0.7)
    beside(axes, len(rungs), share_percent(levels[-1]), 10, weight="bold")
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("share of E[d²], added up from the rollout to the trainer")
    heading_beside(axes, "share, 95 % interval", 10)
    heading_beside(axes, "RMS of the rung (nats)", _RMS_COLUMN)


def _draw_anchor(axes: Axes, anchor: Sequence[Document]) -> None:
    name_rows(axes, range(len(anchor)), [row_label(row["level"]) for row in anchor])
    errors = [row["error_rms"] for row in anchor]
    values = [error["value"] for error in errors]
    ends = [end for error in errors for end in limits_of(error) or ()]
    high = bounds_of([0.0, *values], ends, max(values))[1]
    axes.set_xlim(0.0, 1.06 * high or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    for y, error in enumerate(errors):
        limits = limits_of(error)
        if limits is not None:
            whisker(axes, y, limits, INK)
        axes.plot([error["value"]], [y], "D", color=INK, markersize=5, clip_on=False)
        beside(axes, y, _with_limits(error), 10)
    axes.set_xlabel("RMS error of a log-prob against the FP32 trainer (nats)")


def has_knobs(document: Document) -> bool:
    """Whether a setting has been measured."""
    return any(row["status"] == "measured" for row in document["knobs"])


def knobs_figure(document: Document) -> Figure:
    """RMS of the gap with each setting over that without it, by side, what makes it smaller first."""
    measured = [row for row in document["knobs"] if row["status"] == "measured"]
    groups = {side: _sorted(row for row in measured if row["side"] == side) for side in SIDES}
    lines: list[str | Document] = []
    for side, rows in groups.items():
        lines += [side, *rows] if rows else []
    with plot_settings():
        figure = Figure(figsize=(9.6, 0.27 * len(lines) + 1.1), layout="constrained")
        axes = figure.add_subplot()
        names = [f"{line} settings" if isinstance(line, str) else row_label(_marked(line), 60) for line in lines]
        name_rows(axes, range(len(lines)), names)
        ratio_axis(axes, [row["rms_ratio"] for row in measured])
        for y, line in enumerate(lines):
            if isinstance(line, str):
                axes.get_yticklabels()[y].set_fontweight("bold")
            else:
                _draw_knob(axes, y, line)
        axes.set_xlabel("RMS of the gap with the setting / without it; filled where it differs from 1 (Holm, 5 %)")
        heading_beside(axes, "ratio, 95 % interval", 10)
        heading_beside(axes, "time", _TIME_COLUMN)
        if any(row["note"] for row in measured):
            note = "† see its note in the table of settings"
            figure.supxlabel(note, fontsize=8, color=DIM)
    return figure


def _sorted(rows: Any) -> list[Document]:
    return sorted(rows, key=lambda row: order_of(row["rms_ratio"]))


def _marked(row: Document) -> str:
    return f"{row['change']} †" if row["note"] else str(row["change"])


def _draw_knob(axes: Axes, y: int, row: Document) -> None:
    mark, ratio = SIDES[row["side"]], row["rms_ratio"]
    ends, value = limits_of(ratio), value_of(ratio)
    if ends is not None:
        whisker(axes, y, ends, mark.color)
    if value == 0:  # not on a logarithmic axis
        axes.plot([axes.get_xlim()[0]], [y], marker=CARETLEFT, color=mark.color, markersize=6)
    elif value:
        face = mark.color if row["differs"] else "white"
        axes.plot([value], [y], mark.marker, color=mark.color, markerfacecolor=face, markersize=5.5, zorder=3)
    # A ratio without an interval says why in its place.
    text = f"{number(value)} {_limits(ratio) or row_label(ratio.get('why', ''))[:24]}"
    beside(axes, y, text.rstrip(), 10)
    time = row["time_ratio"]
    beside(axes, y, NONE if time is None else f"{number(time)}×", _TIME_COLUMN)


def has_fixes(document: Document) -> bool:
    """Whether a class of modules has been tried in FP32."""
    return any(_left(row) is not None for row in document["fixes"]["rows"])


def fixes_figure(document: Document) -> Figure:
    """What classes of modules in FP32 leave of the gap, and beside it the time that they add."""
    fixes = document["fixes"]
    rows = [row for row in fixes["rows"] if _left(row) is not None]
    wanted = fix_wanted(fixes)
    with plot_settings():
        figure = Figure(figsize=(9.6, 0.36 * len(rows) + 1.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1.0))
        name_rows(left, range(len(rows)), [row_label(class_names(row["classes"]), 34) for row in rows])
        name_rows(right, range(len(rows)), [row_label(class_names(row["classes"]), 34) for row in rows])
        right.tick_params(axis="y", labelleft=False)
        values = [row["rms_ratio"]["value"] for row in rows]
        ends = [end for row in rows for end in limits_of(row["rms_ratio"]) or ()]
        left.set_xlim(0.0, 1.05 * bounds_of([0.0, 1.0, *values], ends, 0.5)[1])
        _draw_marks(left, fixes)
        for y, row in enumerate(rows):
            _draw_fix(left, right, y, row, chosen=wanted is not None and row["classes"] == wanted["classes"])
        left.set_xlabel("RMS of the gap left / without a change")
        right.set_xlabel("time added")
        right.axvline(0.0, color=INK, linewidth=0.8)
        right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        if left.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=3.0)
    return figure


def _left(row: Document) -> float | None:
    return value_of(row.get("rms_ratio")) if row["status"] == "measured" else None


def _draw_marks(axes: Axes, fixes: Document) -> None:
    """What is wanted, and what a trainer wholly in FP32 would leave."""
    axes.axvline(1.0, color=INK, linewidth=0.8, zorder=1.5)
    whole = value_of(fixes.get("whole_trainer_in_fp32"))
    if whole is not None:
        label = f"the whole trainer in FP32: {number(whole)}"
        axes.axvline(whole, color="#777777", linewidth=1.3, linestyle=":", label=label, zorder=1.5)
    if fixes["target"] is not None and fixes["target"] < 1:
        label = f"target: {number(fixes['target'])} or less"
        axes.axvline(fixes["target"], color="#b3261e", linewidth=1.3, linestyle="--", label=label, zorder=1.5)


def _draw_fix(left: Axes, right: Axes, y: int, row: Document, *, chosen: bool) -> None:
    mark, ratio, time = SIDES["trainer"], row["rms_ratio"], row["added_time"]
    ends = limits_of(ratio)
    if ends is not None:
        whisker(left, y, ends, mark.color)
    label = "cheapest set that meets the target" if chosen else None
    left.plot(
        [ratio["value"]],
        [y],
        "*" if chosen else mark.marker,
        color=INK if chosen else mark.color,
        markersize=12 if chosen else 5.5,
        linestyle="none",
        label=label,
        zorder=3,
    )
    if chosen:
        left.get_yticklabels()[y].set_fontweight("bold")
    if time is not None:
        right.barh(y, time, 0.5, color="#c9cdd3", edgecolor=INK, linewidth=0.7)
        beside(right, y, percent(time), 8)


def _limits(metric: Document) -> str:
    return interval(metric.get("ci_low"), metric.get("ci_high"))


def _with_limits(metric: Document) -> str:
    return f"{number(metric.get('value'))} {_limits(metric)}".rstrip()
