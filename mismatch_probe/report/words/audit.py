"""Words of an audit's findings, and of its checks, limits and needs."""

from __future__ import annotations

from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.ratio_test import NEGLIGIBLE
from mismatch_probe.report.format import count, digits_of, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.audit import Bounds, Settle
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

CHECK_TITLES = {
    "nonfinite_logprobs": "log-probs that are not finite or impossible",
    "fp32_floor": "mean |d| of the FP32 pair (nats)",
    "one_sided": "mean importance ratio",
    "ess_seq_planned": "predicted ESS of sequence weights at the planned length",
    "fp16_unsupported": "dtype that vLLM does not support",
    "fp16_headroom": "65,504 over the largest activation",
    "fp16_overflow_rate": "tokens with an activation that FP16 has no number for",
    "fp16_attention_headroom": "65,504 over the largest product q·k",
    "fp16_weights": "relative error of the weight tensor that FP16 keeps worst",
    "fp16_loss_scale": "room between loss scales that flush and that overflow (powers of 2)",
    "fp16_loss_scale_start": "room above the usual first loss scale of 2^16 (powers of 2)",
    "fp16_pass": "FP16 forward and backward passes that are not finite",
}
"""What the checks are of that are no metric of the catalogue."""
PART_TITLES = {
    "weights": "conversion of the weights to 16 bits",
    "forward": "range of activations",
    "backward": "range of gradients",
    "lag": "lag of the engine behind FP32 masters",
    "proof": "a pass in FP16",
}
"""What is measured on the model itself."""


def check_title(name: str) -> str:
    """A check in a few words, with its unit."""
    info = CATALOG.get(name)
    if info is None:
        return CHECK_TITLES.get(name, name)
    return f"{info.title} ({info.unit})" if info.unit else info.title


def pair_label(rollout: str, trainer: str, mode: str = "") -> str:
    """`FP16` where both sides are, else `FP16 → FP32`; with the trainer's mode where it is autocast."""
    names = dtype_label(rollout), dtype_label(trainer)
    label = names[0] if names[0] == names[1] else " → ".join(names)
    return f"{label} (autocast)" if mode == "autocast" else label


def limit_text(bounds: Bounds) -> str:
    """`warn above 0.001, fail above 0.015`."""
    parts = [f"{name.replace('_', ' ')} {value:g}" for name, value in bounds.limits.items()]
    if bounds.event is not None and bounds.within is None:
        parts.append(f"{bounds.event} if one occurs")
    if bounds.rate_below is not None:
        parts.append(f"ok if fewer than {percent(bounds.rate_below)} of prompts can show more")
    if bounds.within is not None:
        parts.append(
            f"{bounds.event or 'fail'} if a test is violated, ok if the interval is within 1 ± {bounds.within:g}"
        )
    return ", ".join(parts)


def settle_text(settle: Settle, max_tokens: int) -> str:
    """What would settle an inconclusive check.

    Args:
        settle: The data.
        max_tokens: Longest response of the run, tokens.
    """
    parts = []
    if settle.more_prompts is not None:
        at = "" if settle.max_tokens is not None else f" with responses of up to {count(max_tokens)} tokens"
        parts.append(f"about {count(settle.more_prompts)} more prompts{at}")
    if settle.max_tokens is not None:
        parts.append(f"responses of {count(settle.max_tokens)} tokens")
    if settle.parts:
        parts.append("measurement of the " + " and the ".join(_part(part) for part in settle.parts))
    if settle.dtypes:
        parts.append(f"a run that includes {' and '.join(dtype_label(name) for name in settle.dtypes)}")
    if settle.trainer_modes:
        parts.append(f"the pass in FP16 in trainer mode {' and '.join(settle.trainer_modes)}")
    texts = [f"What settles it: {'; '.join(parts)}."] if parts else []
    if settle.unknown:
        texts.append(f"More prompts alone do not settle {', '.join(settle.unknown)}.")
    return " ".join(texts)


def _part(name: str) -> str:
    return PART_TITLES.get(name, name).removeprefix("a ")


def said(value: MetricValue, unit: str = "") -> str:
    """A value with its interval."""
    return in_line(value, digits_of(value.value), unit)


def unseen(finding: Finding) -> str:
    """Of an event that did not occur: which fraction of prompts that leaves."""
    upper = finding.maybe("upper")
    return "" if upper is None else f"; at most {percent(upper)} of prompts have one"


def _because(finding: Finding) -> str:
    why = finding.text("why").rstrip(".")
    return f": {why}" if why else ""


_METRIC = {"metric": "key of the catalogue"}
UPPER = {"upper": "upper 95 % limit of the fraction of prompts that show it; none where it occurred"}


@words("audit-metric-value", "Value of a metric.", {**_METRIC, "value": "in the metric's unit"})
def _metric_value(finding: Finding) -> str:
    info = CATALOG[finding.text("metric")]
    unit = "" if info.unit in ("probability", "tokens") else info.unit
    return f"{info.title}: {said(finding.metric('value'), unit)}."


@words(
    "audit-metric-count",
    "How many tokens show a rare event.",
    {**_METRIC, "n": "tokens that show it", "n_tokens": "tokens", **UPPER},
)
def _metric_count(finding: Finding) -> str:
    title = CATALOG[finding.text("metric")].title
    return f"{title}: {count(finding.whole('n'))} of {count(finding.whole('n_tokens'))} tokens{unseen(finding)}."


@words("audit-metric-missing", "A metric has no value.", {**_METRIC, "why": "the reason"})
def _metric_missing(finding: Finding) -> str:
    return f"{CATALOG[finding.text('metric')].title} has no value{_because(finding)}."


@words(
    "audit-exact-not-finite",
    "The full distributions cannot be compared at some positions.",
    {**_METRIC, "n": "positions that are not finite"},
)
def _exact_not_finite(finding: Finding) -> str:
    title = CATALOG[finding.text("metric")].title
    return f"{title} has no value: it is not finite at {count(finding.whole('n'))} compared positions."


_TOKENS = {"n": "tokens without a usable log-prob", "n_tokens": "tokens of the pair"}
_EXCLUDED = {**_TOKENS, "values": "side, what it has in place of a log-prob, tokens"}


@words("audit-logprobs-finite", "Every log-prob is finite and possible.", {**_EXCLUDED, **UPPER})
def _logprobs_finite(finding: Finding) -> str:
    upper = finding.maybe("upper")
    rest = "" if upper is None else f"; at most {percent(upper)} of prompts have a token without one"
    return f"All {count(finding.whole('n_tokens'))} tokens have usable log-probs{rest}."


@words(
    "audit-logprobs-not-finite",
    "Log-probs are NaN, infinite, or no log-prob of any probability.",
    {**_EXCLUDED, **UPPER},
    "See which side has them: NaN is an overflow in that engine, a sentinel such as −9999 a missing log-prob.",
)
def _logprobs_not_finite(finding: Finding) -> str:
    n, total = count(finding.whole("n")), count(finding.whole("n_tokens"))
    return f"{n} of {total} tokens have no usable log-prob ({'; '.join(finding.names('values'))})."


@words(
    "audit-no-fp32-pair",
    "The run has no FP32 pair.",
    fix="Run FP32 on both sides, too: it separates rounding from a fault.",
)
def _no_fp32_pair(finding: Finding) -> str:
    return "The run has no FP32 pair, so a fault could be taken for rounding."


@words("audit-fp32-pair-not-finite", "The FP32 pair has tokens without a usable log-prob.", _TOKENS)
def _fp32_pair_not_finite(finding: Finding) -> str:
    n, total = count(finding.whole("n")), count(finding.whole("n_tokens"))
    return f"{n} of {total} tokens of the FP32 pair have no usable log-prob, so its gap is not known."


@words(
    "audit-fp32-floor",
    "Gap between the engines in FP32.",
    {"value": "mean |d|, nats"},
    "Above 1e-4 nats the engines compute different functions: run `mismatch-probe attribute`.",
)
def _fp32_floor(finding: Finding) -> str:
    return f"In FP32 the engines differ by a mean |d| of {said(finding.metric('value'), 'nats')}."


_RATIO = {"value": "mean importance ratio", "negligible": "whether it is off by float32 log-softmax at most"}


@words(
    "audit-mean-ratio-off",
    "The mean importance ratio is not 1.",
    {"value": "mean importance ratio where it is furthest from 1", "family": "which bins: overall, position, …"},
    "One side has a fault: run `mismatch-probe attribute`.",
)
def _mean_ratio_off(finding: Finding) -> str:
    where = {"overall": "over all tokens", "position": "at some positions", "probability": "at some probabilities"}
    place = where.get(finding.text("family"), finding.text("family"))
    return f"The mean importance ratio is {said(finding.metric('value'))} {place}. One side has a fault."


@words(
    "audit-mean-ratio-untested",
    "The mean importance ratio is not tested.",
    {"value": "mean importance ratio", "why": "the reason"},
)
def _mean_ratio_untested(finding: Finding) -> str:
    return f"The mean importance ratio is {said(finding.metric('value'))}. It is not tested{_because(finding)}."


@words("audit-mean-ratio", "The mean importance ratio is 1.", _RATIO)
def _mean_ratio(finding: Finding) -> str:
    return (
        f"The mean importance ratio is {said(finding.metric('value'))}; no test shows that it is not 1.{_off(finding)}"
    )


@words(
    "audit-mean-ratio-open",
    "The mean importance ratio may be 1, and may be off by more than is allowed.",
    {**_RATIO, "within": "how near to 1 the interval has to lie"},
)
def _mean_ratio_open(finding: Finding) -> str:
    ratio, within = said(finding.metric("value")), percent(finding.number("within"))
    return (
        f"The mean importance ratio is {ratio}, which does not exclude a fault of {within} on one side.{_off(finding)}"
    )


def _off(finding: Finding) -> str:
    value = finding.metric("value").value
    if not finding.values.get("negligible") or value is None:
        return ""
    return f" It is off by {abs(value - 1):.1e}; float32 log-softmax is known to be off by up to {NEGLIGIBLE:g}."


_LENGTH = {"length": "planned response length, tokens"}


@words("audit-planned-ess", "Predicted ESS of sequence weights.", {**_LENGTH, "value": "fraction of the sequences"})
def _planned_ess(finding: Finding) -> str:
    value = finding.metric("value")
    note = f" ({value.why})" if value.why else ""
    return f"At {count(finding.whole('length'))} tokens the predicted ESS of sequence weights is {said(value)}{note}."


@words("audit-planned-ess-missing", "No ESS of sequence weights is predicted.", {**_LENGTH, "why": "the reason"})
def _planned_ess_missing(finding: Finding) -> str:
    return f"No ESS of sequence weights is predicted at {count(finding.whole('length'))} tokens{_because(finding)}."


@words(
    "audit-dtype-unsupported",
    "The rollout engine does not support the dtype for this model.",
    {"why": "what the engine says"},
    "Train in another dtype.",
)
def _dtype_unsupported(finding: Finding) -> str:
    return f"{finding.text('why').rstrip('.')}."


_PARTS = {"parts": "what was not measured"}


@words("audit-parts-missing", "Measurements on the model are missing.", _PARTS, "`mismatch-probe audit --resume RUN`.")
def _parts_missing(finding: Finding) -> str:
    return f"Not measured: {', '.join(PART_TITLES.get(name, name) for name in finding.names('parts'))}."


@words(
    "audit-parts-stale",
    "Measurements on the model were made with other settings or by another release, or their file is damaged.",
    _PARTS,
    "`mismatch-probe audit --resume RUN`.",
)
def _parts_stale(finding: Finding) -> str:
    names = ", ".join(PART_TITLES.get(name, name) for name in finding.names("parts"))
    return f"Measured with other settings or by another release, or damaged: {names}."


@words("audit-all-ok", "All checks of a pair are ok.", {"n": "checks"})
def _all_ok(finding: Finding) -> str:
    n = finding.whole("n")
    return f"All {n} checks are ok." if n > 1 else "The one check is ok." if n else "The profile has no check of it."


@words("audit-pair-not-compared", "A pair was not compared.", {"why": "the reason"})
def _pair_not_compared(finding: Finding) -> str:
    return f"It was not compared{_because(finding)}."


_PAIRS = {"pairs": "rollout dtype, trainer dtype and trainer mode of each"}


@words("audit-pairs-missing", "Pairs that could not be compared.", {**_PAIRS, "why": "the reason"})
def _pairs_missing(finding: Finding) -> str:
    return f"Not compared: {_labels(finding)}{_because(finding)}."


@words("audit-pairs-not-in-run", "Pairs that were asked for with --pair and are not in the run.", _PAIRS)
def _pairs_not_in_run(finding: Finding) -> str:
    return f"Asked for and not in the run: {_labels(finding)}."


def _labels(finding: Finding) -> str:
    return ", ".join(pair_label(*name.split("/")) for name in finding.names("pairs"))


@words(
    "audit-no-finite-logprob",
    "No token has a usable log-prob in any pair; `where` is the first weight or activation that is not finite.",
    {
        "n_tokens": "tokens of all pairs",
        "n_pairs": "pairs",
        "weight": "first weight tensor that is not finite",
        "tensor": "first tensor of an FP32 forward pass that is not finite",
        "measured": "whether the forward pass was measured",
    },
    "Compare the checkpoint with its source; a weight that is not finite is a damaged or diverged checkpoint.",
)
def _no_finite_logprob(finding: Finding) -> str:
    pairs = finding.whole("n_pairs")
    text = f"No token has a usable log-prob, in {'any of ' + str(pairs) + ' pairs' if pairs > 1 else 'the one pair'}."
    if finding.text("weight"):
        text += f" The weights of {finding.text('weight')} are not finite."
    if finding.text("tensor"):
        return f"{text} In an FP32 forward pass the first tensor that is not finite is {finding.text('tensor')}."
    if finding.values["measured"]:
        return f"{text} In an FP32 forward pass every tensor is finite."
    return f"{text} The first tensor that is not finite is not known: activations were not measured."
