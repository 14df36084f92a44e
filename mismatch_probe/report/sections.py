"""Sections of a report that are a sentence and a table: what longer responses would do, and training step by step.

As in `view`, every string has been through `visible` and none has been escaped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mismatch_probe.report.format import NONE, count, interval, number, percent, visible
from mismatch_probe.report.matrix import dtype_order, modes_of, ordered_pairs, pair_label
from mismatch_probe.report.names import metric_title
from mismatch_probe.report.view import Table, stacked

if TYPE_CHECKING:
    from mismatch_probe.results.comparison import Comparison
    from mismatch_probe.types import MetricValue


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


def sections(summary: Comparison) -> list[Section]:
    """The sections that a run has data for."""
    found = [_comparisons(summary), _ratio_tests(summary), _power(summary), _length(summary), _steps(summary)]
    return [section for section in found if section.table.rows]


def _comparisons(summary: Comparison) -> Section:
    """Every two dtypes in several metrics."""
    rows = []
    for row in summary.comparisons:
        ratio, differs, detectable = row.ratio, row.differs, row.detectable_ratio
        verdict = visible(ratio.why or NONE) if differs is None else "yes" if differs else "no"
        shown = "" if differs is not False or detectable is None else f"{number(detectable)}× would have shown"
        pair = f"{row.numerator} / {row.denominator}"
        limits = stacked(number(ratio.value), interval(ratio.ci_low, ratio.ci_high))
        cells = (limits, number(row.p_value, 2), number(row.p_holm, 2), stacked(verdict, shown))
        rows.append((visible(pair), metric_title(row.key), *cells))
    header = ("pair", "metric", "ratio", "p", "p, Holm", "differ")
    text = (
        "Ratios of the pairs with equal dtypes, paired by prompt, with 95 % intervals; p-values are adjusted over all "
        "rows (Holm), and where no difference shows, the smallest ratio that would have."
    )
    return Section("comparisons", "Between dtypes", text, Table(header, tuple(rows)))


def _ratio_tests(summary: Comparison) -> Section:
    """E[ρ] = 1 on every on-policy pair, in every bin."""
    modes = modes_of(summary)
    rows = []
    for pair in ordered_pairs(summary):
        for test in pair.ratio_tests:
            mean = test.mean_ratio
            bin_ = test.family if test.left is None else f"{test.family} {number(test.left)}–{number(test.right)}"
            why = visible(mean.why) if test.verdict == "inconclusive" else ""
            value = stacked(number(mean.value, 6), interval(mean.ci_low, mean.ci_high, 6))
            verdict = stacked(test.verdict, why)
            label = visible(pair_label(pair, modes))
            rows.append((label, bin_, count(test.n_tokens), value, number(test.p_holm, 2), verdict))
    header = ("pair", "bin", "tokens", "mean ρ", "p, Holm", "E[ρ] = 1")
    text = (
        "On policy the mean of ρ = π/μ is 1 at every position, however large the rounding errors are: where it is not, "
        "one side's sampling distribution is truncated or rescaled. In bins of probability rounding itself moves the "
        "mean by some d², which is allowed for. p-values are adjusted over all rows (Holm). Violations below 1e-4 are "
        "called negligible: float32 log-softmax alone is off by some 1e-5."
    )
    return Section("ratio-tests", "Is the mean importance ratio 1?", text, Table(header, tuple(rows)))


def _power(summary: Comparison) -> Section:
    """How many more prompts ±5 % would take."""
    modes = modes_of(summary)
    rows = []
    for pair in ordered_pairs(summary):
        for key, needed in pair.prompts_needed.items():
            more = visible(needed.why or NONE) if needed.more is None else count(needed.more)
            half, precision = needed.half_width, percent(needed.precision)
            now = NONE if half is None else f"±{percent(half)}"
            rows.append((visible(pair_label(pair, modes)), metric_title(key), now, stacked(more, f"for ±{precision}")))
    header = ("pair", "metric", "now", "more prompts")
    text = (
        "Half the width of the 95 % interval, and how many more prompts of the same kind are enough for a narrower "
        "one, nine times in ten; where few prompts differ most, less often."
    )
    return Section("power", "How many more prompts?", text, Table(header, tuple(rows)))


def _length(summary: Comparison) -> Section:
    """Predictions at longer responses, a row per dtype and length."""
    rows = []
    for name in dtype_order(summary.length):
        for prediction in summary.length[name].predictions:
            values = [prediction.values[key] for key in ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3")]
            kl = prediction.values["kl_seq"]
            whys = [v.why for v in (*values, kl) if v.value is None]
            why = visible((whys or [values[0].why])[0])
            cells = (stacked(percent(v.value), _percents(v.ci_low, v.ci_high)) for v in values)
            kl_cell = _metric(kl)
            rows.append((visible(name), stacked(count(prediction.length), why), *cells, kl_cell))
    header = ("dtype", "response length", "ESS", "weights outside [½, 2]", "outside [⅓, 3]", "sequence KL (nats)")
    text = (
        "Predicted from each dtype's own samples, with 95 % bands: the effective sample size of the sequence weights "
        "exp D, the share of weights that truncation would touch, and the KL of whole responses. A wide band is wide "
        "because the data do not say more. Bands presume that the prompts at hand show how much prompts differ; where "
        "few of them decide the ESS it is marked, and falls further with more sequences. What contradicts the measured "
        "values is not predicted."
    )
    return Section("length", "What longer responses would do", text, Table(header, tuple(rows)))


def _percents(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def _steps(summary: Comparison) -> Section:
    """Metrics of every training step of a recorded run."""
    modes = modes_of(summary)
    pairs = [pair for pair in ordered_pairs(summary) if pair.steps]
    keys = list(dict.fromkeys(key for pair in pairs for step in pair.steps for key in step.metrics))
    rows = [
        (
            visible(pair_label(pair, modes)),
            str(step.step),
            count(step.n_tokens),
            *(_metric(step.metrics[key]) for key in keys),
        )
        for pair in pairs
        for step in pair.steps
    ]
    header = ("pair", "step", "tokens", *(metric_title(key) for key in keys))
    text = "The mismatch of each training step that the recorded sequences name."
    return Section("steps", "Step by step", text, Table(header, tuple(rows)))


def _metric(value: MetricValue) -> str:
    return stacked(number(value.value), interval(value.ci_low, value.ci_high))
