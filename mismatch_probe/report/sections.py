"""Sections of a report that are a sentence and a table: what longer responses would do, and training step by step.

As in `view`, every string has been through `visible` and none has been escaped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch_probe.report.format import NONE, count, interval, number, percent, visible
from mismatch_probe.report.matrix import dtype_order, ordered_pairs, pair_label, trainer_modes
from mismatch_probe.report.names import metric_title
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Section:
    """A table under its heading.

    Attributes:
        name: For an anchor.
        title: The heading.
        text: What has to be known to read the table.
        table: With rows.
    """

    name: str
    title: str
    text: str
    table: Table


def sections(summary: Mapping[str, Any]) -> list[Section]:
    """The sections that a run has data for."""
    found = [_length(summary), _steps(summary)]
    return [section for section in found if section.table.rows]


def _length(summary: Mapping[str, Any]) -> Section:
    """Predictions at longer responses, a row per dtype and length."""
    lengths: Mapping[str, Mapping[str, Any]] = summary.get("length") or {}
    rows = []
    for name in dtype_order(lengths):
        for prediction in lengths[name].get("predictions") or ():
            values = [prediction.get(key) or {} for key in ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3")]
            kl = prediction.get("kl_seq") or {}
            why = "" if values[0].get("value") is not None else visible(values[0].get("why") or "")
            cells = (stacked(percent(v.get("value")), _percents(v.get("ci_low"), v.get("ci_high"))) for v in values)
            kl_cell = stacked(number(kl.get("value")), interval(kl.get("ci_low"), kl.get("ci_high")))
            rows.append((visible(name), stacked(count(prediction.get("length")), why), *cells, kl_cell))
    header = ("dtype", "response length", "ESS", "weights outside [½, 2]", "outside [⅓, 3]", "sequence KL (nats)")
    text = (
        "Predicted from each dtype's own samples, with 95 % bands: the effective sample size of the sequence weights "
        "exp D, the share of weights that truncation would touch, and the KL of whole responses. A wide band is wide "
        "because the data do not say more."
    )
    return Section("length", "What longer responses would do", text, Table(header, tuple(rows)))


def _percents(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def _steps(summary: Mapping[str, Any]) -> Section:
    """Metrics of every training step of a recorded run."""
    modes = trainer_modes(summary)
    pairs = [pair for pair in ordered_pairs(summary) if pair.get("steps")]
    keys = list(dict.fromkeys(key for pair in pairs for step in pair["steps"] for key in step.get("metrics") or {}))
    rows = [
        (
            visible(pair_label(pair, modes)),
            visible(step.get("step", NONE)),
            count(step.get("n_tokens")),
            *(_metric((step.get("metrics") or {}).get(key) or {}) for key in keys),
        )
        for pair in pairs
        for step in pair["steps"]
    ]
    header = ("pair", "step", "tokens", *(metric_title(key) for key in keys))
    text = "The mismatch of each training step that the recorded sequences name."
    return Section("steps", "Step by step", text, Table(header, tuple(rows)))


def _metric(value: Mapping[str, Any]) -> str:
    return stacked(number(value.get("value")), interval(value.get("ci_low"), value.get("ci_high")))
