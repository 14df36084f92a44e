"""Words of a comparison's findings."""

from __future__ import annotations

from mismatch_probe.metrics.accounting import CONTRADICTED
from mismatch_probe.report.format import count, interval, number
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue


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
    "Find out why an engine writes these values: NaN is an overflow, a sentinel such as −9999 a missing log-prob.",
)
def _excluded(finding: Finding) -> str:
    rows = []
    for row in finding.names("excluded"):
        side, rest = row.split(" ", 1)
        value, tokens = rest.rsplit(" ", 1)
        other = "trainer" if side == "rollout" else "rollout"
        against = f" where the {other} has less than {CONTRADICTED}" if value == "0" else ""
        rows.append(f"{side} {value}{against}: {int(tokens):,}")
    n, total = int(finding.number("n_excluded")), int(finding.number("n_tokens"))
    text = (
        f"{finding.where}: {n:,} of {total:,} tokens have no usable log-probs and are left out of every metric "
        f"({'; '.join(rows)})."
    )
    with_them = finding.maybe("mean_abs_all_finite")
    if with_them is None:
        return text
    without = number(finding.maybe("mean_abs"))
    return f"{text} With the finite ones mean |Δlogp| would be {number(with_them)} nats, not {without}."


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
        return f"The gap in BF16 is {shown} times that in FP16 (mean |Δlogp|), without interval: {ratio.why}."
    shown = f"{number(ratio.value)} {interval(ratio.ci_low, ratio.ci_high)}"
    basis = f"mean |Δlogp|, paired over {count(int(finding.number('n_prompts')))} prompts, 95 % interval"
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
        return f"In FP32 both engines agree to {shown}, so the gap in 16 bits is rounding."
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
        text += f" BF16 is {bf16 / fp16:.0f} times FP16; rounding alone predicts 2⁶ = 64."
    return text


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
    observed, mark = count(int(finding.number("observed_length"))), finding.text("mark")
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
