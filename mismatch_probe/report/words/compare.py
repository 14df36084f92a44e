"""Words of a comparison's findings."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.chunks import CONTRADICTED
from mismatch_probe.report.format import count, interval, number
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

SHORT_TITLES = {
    "mean_abs_logprob_diff": "mean |d|",
    "kl_k3": "KL k3",
    "kl_exact": "exact KL",
    "ess_seq": "ESS",
    "max_abs_logprob_diff": "worst token",
}
"""What headline metrics are called where room is short."""
_LOOK = "Look for a fault with `mismatch-probe attribute --resume RUN`."
_EVIDENCE = {
    "fp32-floor": "both engines differ in FP32",
    "mean-ratio-not-one": "the mean importance ratio is not 1",
    "excluded-tokens": "some tokens have no usable log-probs",
    "bf16-over-fp16": "the gap in FP16 is larger than in BF16",
    "size": "the gap is larger than 16-bit rounding makes it",
}
_OPEN = {
    "recorded": "recorded log-probs name no dtype: score and decode the ids here with --model, --rescore and --replay",
    "no-fp32": "there is no pair in FP32: add float32 to --rollout-dtypes and --trainer-dtypes",
    "no-16-bit": "there is no pair in BF16 or FP16 on both sides",
    "fp32-floor": "too few prompts bound the gap in FP32",
    "size": "too few prompts bound the gap in {}",
    "mean-ratio": "too few tokens or prompts test the mean importance ratio in {}",
    "bf16-over-fp16": "too few prompts tell BF16 and FP16 apart",
}


@words(
    "all-unusable",
    "No token of any pair has usable log-probs, so there is nothing to measure.",
    {
        "n_tokens": "tokens of all pairs",
        "n_pairs": "pairs",
        "excluded": "side, value in place of a log-prob, and number of tokens",
    },
    "Look for the first tensor that is not finite: `mismatch-probe audit --resume RUN`.",
)
def _all_unusable(finding: Finding) -> str:
    pairs, tokens = finding.whole("n_pairs"), finding.whole("n_tokens")
    return (
        f"No token has usable log-probs in any of {count(pairs)} pairs ({_values(finding)} of {count(tokens)} tokens): "
        "nothing can be measured. The model, its weights or its dtype is broken: look for the first tensor that is "
        "not finite."
    )


@words(
    "run-unfinished",
    "Some passes have not run, failed, or were interrupted.",
    {"status": "of the run"},
    "Continue it with `mismatch-probe compare --resume RUN`.",
)
def _unfinished(finding: Finding) -> str:
    return f"The run is {finding.text('status')}: all numbers are of the passes that finished."


@words(
    "off-policy",
    "Another policy sampled the tokens of some pairs, so metrics that need the rollout's own are absent.",
    {"why": "who sampled them"},
)
def _off_policy(finding: Finding) -> str:
    why = finding.text("why") or "the rollout policy did not sample these tokens"
    return f"{finding.where}: {why}, so metrics that need the rollout policy's own samples are absent."


@words(
    "limited-metrics",
    "What limits the value or the interval of headline metrics.",
    {"metrics": "keys of the metrics", "why": "what limits them"},
)
def _limited(finding: Finding) -> str:
    names = ", ".join(SHORT_TITLES[key] for key in finding.names("metrics"))
    return f"{names}, {finding.where}: {finding.text('why').rstrip('.')}."


@words(
    "kind-rounding",
    "The gap is rounding: every mark of it was measured, and none is broken.",
    {"dtypes": "16-bit dtypes of the pairs"},
)
def _rounding(finding: Finding) -> str:
    return f"The gap is rounding, as expected of {_labels(finding.names('dtypes'))}."


@words(
    "kind-more-than-rounding",
    "The gap is more than rounding.",
    {"evidence": "codes of what rounding does not do"},
    _LOOK,
)
def _more(finding: Finding) -> str:
    evidence = "; ".join(_EVIDENCE[code] for code in finding.names("evidence"))
    return f"The gap is more than rounding: {evidence}."


@words(
    "kind-unclear",
    "Whether the gap is rounding is unclear: something was not measured, or by too few prompts.",
    {
        "open": "what is not settled",
        "more_prompts": "prompts in addition that would settle what prompts can; none where they cannot",
    },
    "Add what is missing, or more prompts with --num-prompts.",
)
def _unclear(finding: Finding) -> str:
    said = []
    for name in finding.names("open"):
        kind, _, dtype = name.rpartition("-")
        said.append(_OPEN[name] if name in _OPEN else _OPEN[kind].format(dtype_label(dtype)))
    text = f"Whether the gap is rounding is unclear: {'; '.join(said)}."
    more = finding.maybe("more_prompts")
    return text if more is None else f"{text} About {count(int(more))} more prompts would settle what prompts can."


def _labels(dtypes: Sequence[str]) -> str:
    return " and ".join(dtype_label(dtype) for dtype in dtypes)


def _values(finding: Finding) -> str:
    """What stands in place of log-probs: `rollout nan: 12; trainer -9999: 3`."""
    rows = []
    for row in finding.names("excluded"):
        side, rest = row.split(" ", 1)
        value, tokens = rest.rsplit(" ", 1)
        other = "trainer" if side == "rollout" else "rollout"
        against = f" where the {other} has less than {CONTRADICTED}" if value == "0" else ""
        rows.append(f"{side} {value}{against}: {int(tokens):,}")
    return "; ".join(rows)


@words(
    "excluded-tokens",
    "Tokens of a pair have no usable log-probs and are left out of every metric.",
    {
        "n_excluded": "tokens that are left out",
        "n_tokens": "tokens of the pair",
        "excluded": "side, value in place of a log-prob, and number of tokens",
        "mean_abs": "mean |d| of the usable tokens, nats",
        "mean_abs_all_finite": "mean |d| with the finite excluded tokens, nats; none where there are none",
    },
    "Find out why an engine writes these values: NaN is an overflow, a sentinel such as −9999 a missing log-prob, and "
    "so is a value that repeats at many consecutive tokens.",
)
def _excluded(finding: Finding) -> str:
    n, total = finding.whole("n_excluded"), finding.whole("n_tokens")
    text = (
        f"{finding.where}: {n:,} of {total:,} tokens have no usable log-probs and are left out of every metric "
        f"({_values(finding)})."
    )
    with_them = finding.maybe("mean_abs_all_finite")
    if with_them is None:
        return text
    without = number(finding.maybe("mean_abs"))
    return f"{text} With the finite ones mean |d| would be {number(with_them)} nats, not {without}."


@words(
    "bf16-over-fp16",
    "How many times larger the gap is in BF16 than in FP16, paired by prompt.",
    {"ratio": "mean |d| in BF16 over that in FP16", "n_prompts": "prompts"},
    "FP16 above BF16 is not rounding: look for a fault with `mismatch-probe attribute`.",
)
def _formats(finding: Finding) -> str:
    ratio = finding.metric("ratio")
    if ratio.value is None:
        return f"BF16 and FP16 cannot be compared: {ratio.why}."
    if ratio.ci_low is None or ratio.ci_high is None:
        shown = number(ratio.value)
        return f"The gap in BF16 is {shown} times that in FP16 (mean |d|), without interval: {ratio.why}."
    shown = f"{number(ratio.value)} {interval(ratio.ci_low, ratio.ci_high)}"
    basis = f"mean |d|, paired over {count(finding.whole('n_prompts'))} prompts, 95 % interval"
    basis += f", {ratio.why}" if ratio.why else ""
    if ratio.ci_low > 1:
        return f"The gap in BF16 is {shown} times that in FP16 ({basis})."
    if ratio.ci_high < 1:
        return (
            f"The gap in FP16 is larger than in BF16: BF16 over FP16 is {shown} ({basis}). Rounding does not do that."
        )
    return (
        f"The gaps in BF16 and FP16 do not differ measurably: BF16 over FP16 is {shown} ({basis}). A ratio above "
        f"{number(ratio.ci_high / ratio.value)} would have shown."
    )


@words(
    "fp32-floor",
    "How far both engines are apart in FP32, where rounding leaves almost nothing.",
    {"gap": "mean |d| in FP32, nats", "bound": "largest mean |d| that rounding leaves in FP32, nats"},
    "Above the bound, look for what differs beside rounding: `mismatch-probe attribute`.",
)
def _floor(finding: Finding) -> str:
    floor, bound = finding.metric("gap"), finding.number("bound")
    if floor.value is None:
        return f"The FP32 floor is unknown: {floor.why}."
    shown = f"{number(floor.value, 2)} nats"
    if finding.severity == "info":
        return f"In FP32 both engines agree to {shown}."
    if finding.severity == "note":
        return f"In FP32 both engines agree to {shown}; the interval reaches {number(bound, 2)} nats and more."
    return f"In FP32 both engines differ by {shown}, more than rounding leaves: they compute different things."


@words(
    "mean-ratio-not-one",
    "The mean importance ratio of an on-policy pair is not 1, which rounding does not explain.",
    {"mean_ratio": "mean ρ of the bin that is furthest from 1", "family": "overall, position or probability"},
    "Look for a truncated or rescaled sampling distribution, or a padded vocabulary, on one side.",
)
def _mean_ratio(finding: Finding) -> str:
    ratio, family = finding.metric("mean_ratio"), finding.text("family")
    place = "over all tokens" if family == "overall" else f"in a bin of {family}"
    return (
        f"{finding.where}: the mean importance ratio is {in_line(ratio, 5)} {place}, not 1. On policy rounding does "
        "not do that: look for a truncated or rescaled sampling distribution, or a padded vocabulary, on one side."
    )


@words(
    "exact-kl",
    "Exact KL(μ‖π) of the pairs with equal dtypes, from full rows of logits.",
    {"kl": "by dtype, nats per token"},
)
def _exact(finding: Finding) -> str:
    exact = finding.metrics("kl")
    parts = [f"{name} {in_line(value)}" for name, value in exact.items()]
    text = f"Exact KL(μ‖π) in nats per token: {', '.join(parts)}."
    bf16, fp16 = (exact.get(name, MetricValue(None)).value for name in ("bfloat16", "float16"))
    if bf16 and fp16:
        text += f" BF16 over FP16 is {number(bf16 / fp16, 2)}; rounding alone predicts 2⁶ = 64."
    return text


@words(
    "stale-weights",
    "Older weights than the trainer's sampled some tokens, so the gap holds updates as well as engines.",
    {
        "n_stale": "tokens that older weights sampled",
        "n_tokens": "tokens of the pair",
        "oldest": "versions between the oldest weights and the trainer's",
        "fresh": "mean |d| of the tokens that the trainer's own weights sampled, nats",
        "all": "mean |d| of all tokens, nats",
    },
    "Read the gap of the engines from the tokens of age 0.",
)
def _stale(finding: Finding) -> str:
    stale, tokens, oldest = (finding.whole(name) for name in ("n_stale", "n_tokens", "oldest"))
    fresh, every = finding.metric("fresh"), finding.metric("all")
    own = "no token is of the trainer's own weights"
    if fresh.value is not None:
        own = f"over tokens of the trainer's own weights it is {in_line(fresh, unit='nats')}"
    return (
        f"{finding.where}: weights up to {count(oldest)} versions older than the trainer's sampled {count(stale)} of "
        f"{count(tokens)} tokens. Mean |d| is {in_line(every, unit='nats')} over all tokens; {own}."
    )


@words(
    "error-budget",
    "Whether the errors of both sides against the reference explain the gap.",
    {"measured_over_predicted": "by dtype, measured gap over √(e_μ² + e_π²); below 1 both sides share errors"},
)
def _budget(finding: Finding) -> str:
    ratios = finding.metrics("measured_over_predicted")
    parts = [f"{name} {in_line(value)}" for name, value in ratios.items()]
    text = f"Measured gap over the gap that independent errors predict: {', '.join(parts)}."
    return f"{text} Below 1 both sides share errors."


@words(
    "ess-half-length",
    "The response length at which the effective sample size of sequence weights falls below one half.",
    {
        "half": "length with ESS 0.5, tokens",
        "tenth": "length with ESS 0.1, tokens",
        "observed_length": "length of the responses that the prediction rests on, tokens",
        "mark": "what limits the first; empty when nothing does",
    },
    "Correct per token, or keep responses shorter, where sequence weights are needed.",
)
def _half_length(finding: Finding) -> str:
    half, tenth = _tokens(finding.metric("half")), _tokens(finding.metric("tenth"))
    observed, mark = count(finding.whole("observed_length")), finding.text("mark")
    text = (
        f"{finding.where}: predicted from responses of {observed} tokens, the ESS of sequence weights falls below 0.5 "
        f"at {half} and below 0.1 at {tenth}."
    )
    return f"{text} The first is {mark}." if mark else text


def _tokens(length: MetricValue) -> str:
    if length.value is None:
        return "a length beyond reach"
    high = "…" if length.ci_high is None else f"{length.ci_high:,.0f}"
    limits = "" if length.ci_low is None else f" [{length.ci_low:,.0f}, {high}]"
    return f"{length.value:,.0f}{limits} tokens"


@words(
    "no-forecast",
    "Longer responses are not predicted: no model of growth agrees with the measurement.",
    {"why": "what contradicts it"},
    "Measure at the length that you plan, with --max-tokens.",
)
def _no_forecast(finding: Finding) -> str:
    return f"{finding.where}: longer responses are not predicted: {finding.text('why')}."
