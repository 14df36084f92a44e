"""An attribution as plain strings, in the order it is read: sentences, then sections of a text, a table and figures.

As in `view`, every string has been through `visible` and none has been escaped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mismatch_probe.report.attribute_tables import AttributedSection, inside_sections, nothing, value_cell
from mismatch_probe.report.attribute_words import (
    class_names,
    doubt,
    fix_wanted,
    fixes_text,
    nutshell,
    order_of,
    share_percent,
    share_percents,
    unmeasured,
    warnings,
)
from mismatch_probe.report.format import NONE, interval, number, percent, visible
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    Document = Mapping[str, Any]

_SIDES = {"neither": "neither side", "rollout": "rollout alone", "trainer": "trainer alone", "both": "both sides"}


@dataclass(frozen=True)
class AttributionView:
    """What a report shows of an attribution.

    Attributes:
        texts: The result in a nutshell.
        notes: What limits it.
        sections: The rest.
    """

    texts: list[str]
    notes: list[str]
    sections: list[AttributedSection] = field(default_factory=list)


def attribution_view(document: Document) -> AttributionView:
    """Everything that is shown of the content of `attribution.json`."""
    made = [_causes(document), _ladder(document), _anchor(document), _knobs(document), _unmeasured(document)]
    made += [_two_sided(document), *inside_sections(document), _fixes(document), _experts(document)]
    return AttributionView(nutshell(document), warnings(document), [section for section in made if section is not None])


def _share_cell(metric: Document) -> str:
    return stacked(share_percent(metric["value"]), share_percents(metric) or visible(metric.get("why") or ""))


def _causes(document: Document) -> AttributedSection:
    rows = tuple(
        (
            f"{cause['rank']}. {visible(cause['text'])}",
            stacked(share_percent(cause["share"]), share_percents(cause) or visible(cause["why"])),
            visible(cause["action"]),
        )
        for cause in document["causes"]
    )
    text = (
        "Rungs are parts of the gap and add up to all of it. A change says how much of E[d²] is gone with it, whatever "
        "rung it was in, so that changes overlap with rungs and with each other. A fault has no share: it is listed "
        "first because rounding does not explain it."
        if rows
        else "No cause was found."
    )
    table = Table(("cause", "share of E[d²]", "what to do"), rows)
    return AttributedSection("causes", "Causes, the largest first", text, table, wide=(2,), open=True)


def _ladder(document: Document) -> AttributedSection:
    rows = tuple(
        (
            visible(rung["change"]),
            _share_cell(rung["share"]),
            value_cell(rung["rms"]),
            value_cell(rung["mean"]),
        )
        for rung in document["ladder"]["rungs"]
    )
    text = (
        "The same tokens are read again, one thing changed at a time from the rollout to the trainer, in the order of "
        "the rows. The order is part of the answer: another one would give other shares. A share is "
        "E[d_rung · d] / E[d²]; it is negative where a rung undoes what others did. The RMS of rungs do not add up, "
        "and can each be as large as the gap's, where one rung's rounding undoes another's."
    )
    ratio = document["ladder"]["squares_over_gap"]
    if ratio is not None:
        text += f" Here their squares add up to {number(ratio)} times the gap's; independent rungs would give 1."
    if not rows:
        text = nothing(document["ladder"]["why"])
    table = Table(("rung", "share of E[d²]", "RMS (nats)", "mean (nats)"), rows)
    return AttributedSection("ladder", "Rung by rung", text, table, ("attribute-ladder",))


def _anchor(document: Document) -> AttributedSection | None:
    rows = tuple((visible(row["level"]), value_cell(row["error_rms"])) for row in document["ladder"]["anchor"])
    if not rows:
        return None
    text = "How far the log-probs of each level are from those of the trainer in FP32."
    table = Table(("level", "RMS error (nats)"), rows)
    return AttributedSection("anchor", "Each level against the FP32 trainer", text, table, brief=False)


def _knobs(document: Document) -> AttributedSection:
    measured = [row for row in document["knobs"] if row["status"] == "measured"]
    order = {"rollout": 0, "trainer": 1}
    measured.sort(key=lambda row: (order.get(row["side"], 2), order_of(row["rms_ratio"])))
    text = (
        "One setting changed at a time, against the same readings without it. A ratio below 1 is a smaller gap; the "
        "shift is how far the setting moves log-probs, towards the other side or not. Whether a setting alters the gap "
        "at all is tested for all of them together, those on both sides included (Holm); an interval that leaves 1 out "
        "although that test does not says so. " + _nulls(document)
        if measured
        else "No setting was measured."
    )
    header = ("setting", "side", "RMS of the gap, ratio", "KL k3, ratio", "shift (nats)", "time", "peak memory", "note")
    table = Table(header, tuple(_knob_row(row) for row in measured))
    return AttributedSection("knobs", "Settings", text, table, ("attribute-knobs",), wide=(7,))


def _nulls(document: Document) -> str:
    """What cannot be told from noise."""
    shown = {side: number(null["value"]) for side, null in document["nulls"].items() if null["value"] is not None}
    if not shown:
        return ""
    sides = " and ".join(f"the {side} by an RMS of {value} nats" for side, value in shown.items())
    return f"Run again without a change, log-probs move at {sides}: a shift of that size is none."


def _knob_row(row: Document) -> tuple[str, ...]:
    peak, memory = row["peak_gib"], row["memory_ratio"]
    return (
        stacked(visible(row["change"]), visible(row["name"])),
        visible(row["side"]),
        stacked(value_cell(row["rms_ratio"]), doubt(row)),
        value_cell(row["k3_ratio"]),
        value_cell(row["shift"]),
        _times(row["time_ratio"]),
        NONE if peak is None else stacked(f"{number(peak)} GiB", "" if memory is None else _times(memory)),
        visible(row["note"]),
    )


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{number(ratio)}×"


def _unmeasured(document: Document) -> AttributedSection | None:
    rows = tuple(
        (
            stacked(visible(row["change"]), visible(row["name"])),
            visible(row["side"]),
            visible(row["status"]),
            visible(row["why"]),
        )
        for row in unmeasured(document)
    )
    if not rows:
        return None
    text = "These could make a gap too, and this run says nothing about them."
    table = Table(("setting", "side", "status", "why"), rows)
    return AttributedSection("unmeasured", "Settings that were not measured", text, table, wide=(3,))


def _two_sided(document: Document) -> AttributedSection | None:
    rows = []
    for row in document["two_sided"]:
        if row["cells"]:
            cells = (_side_cell(row, side) for side in _SIDES)
            rows.append((visible(row["name"]), *cells))
        else:
            rows.append((stacked(visible(row["name"]), visible(row["why"])), *([NONE] * len(_SIDES))))
    if not rows:
        return None
    text = (
        "Changes that exist on both sides: RMS of the gap in nats, and its ratio to that with the change on neither. "
        "What helps on both sides may hurt on one."
    )
    table = Table(("change", *_SIDES.values()), tuple(rows))
    return AttributedSection("two-sided", "On one side or both", text, table)


def _side_cell(row: Document, side: str) -> str:
    cell = row["cells"][side]
    ratio, words = cell["rms_ratio"], []
    if side != "neither" and ratio["value"] is not None:
        words.append(f"{number(ratio['value'])}× {interval(ratio.get('ci_low'), ratio.get('ci_high'))}".rstrip())
    if side == row["best"]:
        words.append("smallest")
    if side in row.get("hurts", ()):
        words.append("larger than on neither side")
    return stacked(number(cell["rms"]["value"]), *words)


def _fixes(document: Document) -> AttributedSection:
    fixes = document["fixes"]
    wanted = fix_wanted(fixes)
    rows = []
    for row in fixes["rows"]:
        name = class_names(row["classes"])
        if row["status"] != "measured":
            rows.append((name, NONE, NONE, NONE, visible(row["why"])))
            continue
        chosen = wanted is not None and row["classes"] == wanted["classes"]
        time = row["added_time"]
        cells = (value_cell(row["rms_ratio"]), value_cell(row["trainer_error_ratio"]), percent(time))
        rows.append((name, *cells, "cheapest that meets the target" if chosen else ""))
    text = nothing(fixes["why"])
    if rows:
        text = (
            "Classes of the trainer's modules computed in FP32, alone and together: the RMS of the gap that they "
            f"leave, and of the trainer's own error against FP32, each over that without them. Times are of one pass "
            f"each, and vary from pass to pass. {fixes_text(fixes)}"
        )
    header = ("modules in FP32", "gap left", "trainer's error left", "time added", "note")
    table = Table(header, tuple(rows))
    return AttributedSection("fixes", "FP32 modules at the trainer", text, table, ("attribute-fixes",), wide=(4,))


def _experts(document: Document) -> AttributedSection | None:
    experts = document["experts"]
    if experts is None:
        return None
    title, header = "Routers", ("what", "value")
    if not experts["layers"]:
        return AttributedSection("experts", title, nothing(experts["why"]), Table(header, ()))
    lowest = min(experts["layers"], key=lambda row: row["agreement"])
    ratio = experts["engine_routes"]["rms_ratio"]
    rows = (
        ("tokens that a router sends to other experts in some layer", percent(experts["flipped_tokens"])),
        ("their share of E[d²]", _share_cell(experts["share_of_squares"])),
        ("lowest agreement of a layer", stacked(percent(lowest["agreement"]), f"layer {lowest['layer']}")),
        ("RMS of the gap with the trainer's own routes (nats)", value_cell(experts["own_routes"]["rms"])),
        ("RMS of the gap with the engine's routes (nats)", value_cell(experts["engine_routes"]["rms"])),
        ("ratio of the two", value_cell(ratio)),
    )
    text = (
        "How often both sides choose the same experts, and the gap to the engine by prefill once the trainer is given "
        "the engine's choice."
    )
    return AttributedSection("experts", title, text, Table(header, rows), ("attribute-experts",))
