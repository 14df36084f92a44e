"""The figures of an attribution: its ladder, its settings, and FP32 modules at the trainer."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT
from matplotlib.ticker import MaxNLocator

from mismatch_probe.report.figures import figure
from mismatch_probe.report.figures.style import (
    DIM,
    INK,
    SIDES,
    beside,
    bounds_of,
    heading_beside,
    limits_of,
    name_rows,
    plot_settings,
    ratio_axis,
    row_label,
    whisker,
)
from mismatch_probe.report.format import NONE, interval, number, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words.attribute import PASSES, part_interval, part_text, rung_label
from mismatch_probe.results.attribution import Attribution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from mismatch_probe.metrics.ladder import Change
    from mismatch_probe.results.attribution import Fixes, FixResult, SettingResult
    from mismatch_probe.types import MetricValue

_ADDS, _UNDOES = "#5b8fc9", "#f0b277"
# Ends of intervals further than this from every contribution are arrows at the edge.
_ROOM = 0.5
# Points right of a panel.
_RMS_COLUMN, _TIME_COLUMN = 158, 134


def _has_ladder(document: Attribution) -> bool:
    rungs = document.ladder.rungs
    return bool(rungs) and all(rung.contribution.value is not None for rung in rungs)


@figure(
    "attribute-ladder",
    of=Attribution,
    title="Where the gap arises, rung by rung",
    guide="Bars add up to the whole gap in the order of the rows, and a hatched one undoes part of it; below, a pass "
    "is the better the closer its error is to 0.",
    alt="Horizontal bars, one for each rung from rollout to trainer, each starting where the one before ended: its "
    "contribution to E[d²] with its interval. A second panel shows each pass's RMS error against the FP32 trainer.",
    needs=_has_ladder,
    order=1,
)
def ladder_figure(document: Attribution) -> Figure:
    """Contributions to E[d²] rung by rung; below, each pass's error against FP32."""
    rungs = document.ladder.rungs
    errors = {PASSES[row.key]: row.error_rms for row in document.ladder.passes}
    known = {name: error for name, error in errors.items() if error is not None and error.value is not None}
    heights = (len(rungs) + 1.2, 0.7 * len(known) + 0.2) if known else (len(rungs) + 1.2,)
    with plot_settings():
        drawn = Figure(figsize=(9.6, 0.42 * sum(heights) + 0.7 * len(heights)), layout="constrained")
        panels = drawn.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_rungs(panels[0], document)
        if known:
            _draw_errors(panels[1], list(known), list(known.values()))
    return drawn


def _draw_rungs(axes: Axes, document: Attribution) -> None:
    rungs = document.ladder.rungs
    labels = [row_label(rung_label(rung.key, document)) for rung in rungs]
    name_rows(axes, range(len(rungs) + 1), [*labels, "all of the gap"])
    ends = [0.0]
    for rung in rungs:
        ends.append(ends[-1] + (rung.contribution.value or 0.0))
    whiskers = [
        None if (limits := limits_of(rung.contribution)) is None else (start + limits[0], start + limits[1])
        for start, rung in zip(ends, rungs, strict=False)
    ]
    low, high = bounds_of([*ends, 1.0], [end for limits in whiskers if limits for end in limits], _ROOM)
    axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    for y, (rung, (start, end), limits) in enumerate(zip(rungs, pairwise(ends), whiskers, strict=True)):
        color, hatch = (_ADDS, "") if end >= start else (_UNDOES, "////")
        axes.barh(y, end - start, 0.56, start, color=color, hatch=hatch, edgecolor=INK, linewidth=0.7)
        axes.vlines(end, y - 0.28, y + 1.28, color=INK, linewidth=0.7)
        if limits is not None:
            whisker(axes, y, limits, "black")
        beside(axes, y, part_text(rung.contribution.value), 10, weight="bold")
        beside(axes, y, part_interval(rung.contribution), 58)
        beside(axes, y, in_line(rung.rms), _RMS_COLUMN)
    axes.barh(len(rungs), ends[-1], 0.56, color="#cfd4da", edgecolor=INK, linewidth=0.7)
    beside(axes, len(rungs), part_text(ends[-1]), 10, weight="bold")
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("contribution to E[d²], added up from the rollout to the trainer")
    heading_beside(axes, "contribution, 95 % interval", 10)
    heading_beside(axes, "RMS of the rung (nats)", _RMS_COLUMN)


def _draw_errors(axes: Axes, names: Sequence[str], errors: Sequence[MetricValue]) -> None:
    name_rows(axes, range(len(names)), [row_label(name) for name in names])
    values = [error.value or 0.0 for error in errors]
    ends = [end for error in errors for end in limits_of(error) or ()]
    high = bounds_of([0.0, *values], ends, max(values))[1]
    axes.set_xlim(0.0, 1.06 * high or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    for y, (value, error) in enumerate(zip(values, errors, strict=True)):
        limits = limits_of(error)
        if limits is not None:
            whisker(axes, y, limits, INK)
        axes.plot([value], [y], "D", color=INK, markersize=5, clip_on=False)
        beside(axes, y, in_line(error), 10)
    axes.set_xlabel("RMS error of a log-prob against the FP32 trainer (nats)")


@figure(
    "attribute-settings",
    of=Attribution,
    title="What each setting does to the gap",
    guide="Left of the line at 1 the gap is smaller with the setting; an arrow is an interval that goes on.",
    alt="A row for each measured setting, rollout settings above trainer settings, the smallest gap first: RMS of the "
    "gap with the setting over that without, logarithmic, with its interval. Filled marks differ from 1 (Holm, 5 %).",
    needs=lambda document: any(row.effect is not None for row in document.settings),
    order=2,
)
def settings_figure(document: Attribution) -> Figure:
    """RMS of the gap with each setting over that without it, by side, what makes it smaller first."""
    measured = [(row, row.effect) for row in document.settings if row.effect is not None]
    lines: list[tuple[SettingResult, Change] | str] = []
    for side in SIDES:
        own = [pair for pair in measured if pair[0].side == side]
        own.sort(key=lambda pair: math.inf if pair[1].rms_ratio.value is None else pair[1].rms_ratio.value)
        lines += [f"{side} settings", *own] if own else []
    with plot_settings():
        drawn = Figure(figsize=(9.6, 0.27 * len(lines) + 1.1), layout="constrained")
        axes = drawn.add_subplot()
        labels = [line if isinstance(line, str) else row_label(_marked(line[0]), 60) for line in lines]
        name_rows(axes, range(len(lines)), labels)
        ratio_axis(axes, [effect.rms_ratio for _, effect in measured])
        for y, line in enumerate(lines):
            if isinstance(line, str):
                axes.get_yticklabels()[y].set_fontweight("bold")
            else:
                _draw_setting(axes, y, *line)
        axes.set_xlabel("RMS of the gap with the setting / without it; filled where it differs from 1 (Holm, 5 %)")
        heading_beside(axes, "ratio, 95 % interval", 10)
        heading_beside(axes, "time", _TIME_COLUMN)
        if any(row.notes for row, _ in measured):
            drawn.supxlabel("† see its note in the table of settings", fontsize=8, color=DIM)
    return drawn


def _marked(row: SettingResult) -> str:
    return f"{row.change} †" if row.notes else row.change


def _draw_setting(axes: Axes, y: int, row: SettingResult, effect: Change) -> None:
    mark, ratio = SIDES[row.side], effect.rms_ratio
    limits, value = limits_of(ratio), ratio.value
    if limits is not None:
        whisker(axes, y, limits, mark.color)
    if value == 0:  # not on a logarithmic axis
        axes.plot([axes.get_xlim()[0]], [y], marker=CARETLEFT, color=mark.color, markersize=6)
    elif value:
        face = mark.color if effect.differs else "white"
        axes.plot([value], [y], mark.marker, color=mark.color, markerfacecolor=face, markersize=5.5, zorder=3)
    # A ratio without an interval says why in its place.
    text = f"{number(value)} {interval(ratio.ci_low, ratio.ci_high) or row_label(ratio.why)[:24]}"
    beside(axes, y, text.rstrip(), 10)
    beside(axes, y, NONE if row.time_ratio is None else f"{number(row.time_ratio)}×", _TIME_COLUMN)


def _tried(fixes: Fixes) -> list[tuple[FixResult, MetricValue, float]]:
    """Sets of modules with the ratio of RMS that they leave, and its value."""
    effects = [(row, row.effect.rms_ratio) for row in fixes.rows if row.effect is not None]
    return [(row, ratio, ratio.value) for row, ratio in effects if ratio.value is not None]


@figure(
    "attribute-fixes",
    of=Attribution,
    title="FP32 modules at the trainer, and what they cost",
    guide="What lies left of the dashed line is enough, and its shortest bar is the cheapest; below 0 is noise.",
    alt="Left: for each set of module classes in FP32, the RMS of the gap that it leaves over that without it, with "
    "its interval, and lines at the target and at a trainer wholly in FP32. Right: bars of the time that it adds.",
    needs=lambda document: bool(_tried(document.fixes)),
    order=5,
)
def fixes_figure(document: Attribution) -> Figure:
    """What classes of modules in FP32 leave of the gap, and beside it the time that they add."""
    fixes, rows = document.fixes, _tried(document.fixes)
    names = [row_label(" + ".join(row.classes), 34) for row, _, _ in rows]
    with plot_settings():
        drawn = Figure(figsize=(9.6, 0.36 * len(rows) + 1.5), layout="constrained")
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(1.7, 1.0))
        name_rows(left, range(len(rows)), names)
        name_rows(right, range(len(rows)), names)
        right.tick_params(axis="y", labelleft=False)
        ends = [end for _, ratio, _ in rows for end in limits_of(ratio) or ()]
        left.set_xlim(0.0, 1.05 * bounds_of([0.0, 1.0, *(value for _, _, value in rows)], ends, 0.5)[1])
        _draw_marks(left, fixes)
        for y, (row, ratio, value) in enumerate(rows):
            chosen = fixes.cheapest is not None and row.classes == fixes.cheapest.classes
            _draw_ratio(left, y, ratio, value, chosen=chosen)
            if row.added_time is not None:
                right.barh(y, row.added_time, 0.5, color="#c9cdd3", edgecolor=INK, linewidth=0.7)
                beside(right, y, percent(row.added_time), 8)
        left.set_xlabel("RMS of the gap left / without a change")
        right.set_xlabel("time added")
        right.axvline(0.0, color=INK, linewidth=0.8)
        right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        if left.get_legend_handles_labels()[0]:
            drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=3.0)
    return drawn


def _draw_marks(axes: Axes, fixes: Fixes) -> None:
    """What is wanted, and what a trainer wholly in FP32 would leave."""
    axes.axvline(1.0, color=INK, linewidth=0.8, zorder=1.5)
    whole = fixes.whole_trainer_in_fp32
    if whole is not None and whole.value is not None:
        label = f"the whole trainer in FP32: {number(whole.value)}"
        axes.axvline(whole.value, color="#777777", linewidth=1.3, linestyle=":", label=label, zorder=1.5)
    if fixes.target is not None:
        label = f"target: {number(fixes.target)} or less"
        axes.axvline(fixes.target, color="#b3261e", linewidth=1.3, linestyle="--", label=label, zorder=1.5)


def _draw_ratio(axes: Axes, y: int, ratio: MetricValue, value: float, *, chosen: bool) -> None:
    mark, limits = SIDES["trainer"], limits_of(ratio)
    if limits is not None:
        whisker(axes, y, limits, mark.color)
    axes.plot(
        [value],
        [y],
        "*" if chosen else mark.marker,
        color=INK if chosen else mark.color,
        markersize=12 if chosen else 5.5,
        linestyle="none",
        label="cheapest set that meets the target" if chosen else None,
        zorder=3,
    )
    if chosen:
        axes.get_yticklabels()[y].set_fontweight("bold")
