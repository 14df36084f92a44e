"""Words of an audit's findings, and of its checks, limits and needs."""

from __future__ import annotations

from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.metrics.floats import FP16
from mismatch_probe.metrics.ratio_test import NEGLIGIBLE
from mismatch_probe.report.format import count, number, percent
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


def _said(value: MetricValue, unit: str = "") -> str:
    """A value with its interval; near 1 the distance from 1 counts, so that it gets more digits."""
    digits = 5 if value.value is not None and 0.9 < value.value < 1.1 else 3
    return in_line(value, digits, unit)


def _n(finding: Finding, name: str) -> int:
    return int(finding.number(name))


def _unseen(finding: Finding) -> str:
    """Of an event that did not occur: which fraction of prompts that leaves."""
    upper = finding.maybe("upper")
    return "" if upper is None else f"; at most {percent(upper)} of prompts have one"


def _because(finding: Finding) -> str:
    why = finding.text("why").rstrip(".")
    return f": {why}" if why else ""


def _magnitude(value: float) -> str:
    """From 1,000 on in full, so that it can be compared with FP16's largest number."""
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else number(value)


_METRIC = {"metric": "key of the catalogue"}
_UPPER = {"upper": "upper 95 % limit of the fraction of prompts that show it; none where it occurred"}


@words("audit-metric-value", "Value of a metric.", {**_METRIC, "value": "in the metric's unit"})
def _metric_value(finding: Finding) -> str:
    info = CATALOG[finding.text("metric")]
    unit = "" if info.unit in ("probability", "tokens") else info.unit
    return f"{info.title}: {_said(finding.metric('value'), unit)}."


@words(
    "audit-metric-count",
    "How many tokens show a rare event.",
    {**_METRIC, "n": "tokens that show it", "n_tokens": "tokens", **_UPPER},
)
def _metric_count(finding: Finding) -> str:
    title = CATALOG[finding.text("metric")].title
    return f"{title}: {count(_n(finding, 'n'))} of {count(_n(finding, 'n_tokens'))} tokens{_unseen(finding)}."


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
    return f"{title} has no value: it is not finite at {count(_n(finding, 'n'))} compared positions."


_TOKENS = {"n": "tokens without a usable log-prob", "n_tokens": "tokens of the pair"}
_EXCLUDED = {**_TOKENS, "values": "side, what it has in place of a log-prob, tokens"}


@words("audit-logprobs-finite", "Every log-prob is finite and possible.", {**_EXCLUDED, **_UPPER})
def _logprobs_finite(finding: Finding) -> str:
    upper = finding.maybe("upper")
    rest = "" if upper is None else f"; at most {percent(upper)} of prompts have a token without one"
    return f"All {count(_n(finding, 'n_tokens'))} tokens have usable log-probs{rest}."


@words(
    "audit-logprobs-not-finite",
    "Log-probs are NaN, infinite, or no log-prob of any probability.",
    {**_EXCLUDED, **_UPPER},
    "See which side has them: NaN is an overflow in that engine, a sentinel such as −9999 a missing log-prob.",
)
def _logprobs_not_finite(finding: Finding) -> str:
    n, total = count(_n(finding, "n")), count(_n(finding, "n_tokens"))
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
    n, total = count(_n(finding, "n")), count(_n(finding, "n_tokens"))
    return f"{n} of {total} tokens of the FP32 pair have no usable log-prob, so its gap is not known."


@words(
    "audit-fp32-floor",
    "Gap between the engines in FP32.",
    {"value": "mean |d|, nats"},
    "Above 1e-4 nats the engines compute different functions: run `mismatch-probe attribute`.",
)
def _fp32_floor(finding: Finding) -> str:
    return f"In FP32 the engines differ by a mean |d| of {_said(finding.metric('value'), 'nats')}."


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
    return f"The mean importance ratio is {_said(finding.metric('value'))} {place}. One side has a fault."


@words(
    "audit-mean-ratio-untested",
    "The mean importance ratio is not tested.",
    {"value": "mean importance ratio", "why": "the reason"},
)
def _mean_ratio_untested(finding: Finding) -> str:
    return f"The mean importance ratio is {_said(finding.metric('value'))}. It is not tested{_because(finding)}."


@words("audit-mean-ratio", "The mean importance ratio is 1.", _RATIO)
def _mean_ratio(finding: Finding) -> str:
    return (
        f"The mean importance ratio is {_said(finding.metric('value'))}; no test shows that it is not 1.{_off(finding)}"
    )


@words(
    "audit-mean-ratio-open",
    "The mean importance ratio may be 1, and may be off by more than is allowed.",
    {**_RATIO, "within": "how near to 1 the interval has to lie"},
)
def _mean_ratio_open(finding: Finding) -> str:
    ratio, within = _said(finding.metric("value")), percent(finding.number("within"))
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
    return f"At {count(_n(finding, 'length'))} tokens the predicted ESS of sequence weights is {_said(value)}{note}."


@words("audit-planned-ess-missing", "No ESS of sequence weights is predicted.", {**_LENGTH, "why": "the reason"})
def _planned_ess_missing(finding: Finding) -> str:
    return f"No ESS of sequence weights is predicted at {count(_n(finding, 'length'))} tokens{_because(finding)}."


@words(
    "audit-dtype-unsupported",
    "The rollout engine does not support the dtype for this model.",
    {"why": "what the engine says"},
    "Train in another dtype.",
)
def _dtype_unsupported(finding: Finding) -> str:
    return f"{finding.text('why').rstrip('.')}."


_PEAK = {
    "peak": "largest finite |activation|",
    "tensor": "where that is",
    "position": "token of its sequence",
    "longest": "longest context that was seen, tokens",
    "n_nonfinite": "token peaks that are not finite in FP32",
    "nonfinite_at": "first tensor with one",
}


@words("audit-activation-peak", "Largest activation, which FP16 holds; `where` is the tensor it arises in.", _PEAK)
def _activation_peak(finding: Finding) -> str:
    return f"{_largest(finding)}, and arises at {finding.where}. {_seen(finding)}"


@words(
    "audit-activation-overflow",
    "Activations that FP16 has no number for; `where` is the first tensor.",
    _PEAK,
    "Do not run this model in FP16.",
)
def _activation_overflow(finding: Finding) -> str:
    text = f"Activations overflow FP16, first at {finding.where}. {_largest(finding)}. {_seen(finding)}"
    broken = finding.text("nonfinite_at")
    if broken:
        text += f" {count(_n(finding, 'n_nonfinite'))} peaks are not finite in FP32 either, first at {broken}."
    return text


def _largest(finding: Finding) -> str:
    position = finding.maybe("position")
    token = "" if position is None else f", token {int(position)} of a sequence"
    return f"The largest activation is {_magnitude(finding.number('peak'))} at {finding.text('tensor')}{token}"


def _seen(finding: Finding) -> str:
    return f"FP16 ends at {FP16.largest:,.0f}; the longest context seen is {count(_n(finding, 'longest'))} tokens."


@words(
    "audit-overflow-tokens",
    "Tokens with an activation that FP16 rounds to infinity; `where` is the first tensor.",
    {"n": "such tokens", "n_tokens": "tokens", "n_prompts_hit": "prompts with one", "n_prompts": "prompts", **_UPPER},
)
def _overflow_tokens(finding: Finding) -> str:
    n, tokens = _n(finding, "n"), count(_n(finding, "n_tokens"))
    text = f"{count(n)} of {tokens} tokens have an activation of {FP16.overflows_from:,.0f} or more"
    if not n:
        return f"{text}{_unseen(finding)}."
    prompts = f"{count(_n(finding, 'n_prompts_hit'))} of {count(_n(finding, 'n_prompts'))} prompts"
    return f"{text} ({prompts}), first at {finding.where}."


@words("audit-no-attention-product", "No product q·k was seen in this architecture.")
def _no_attention_product(finding: Finding) -> str:
    return "No product q·k was seen in this architecture."


@words(
    "audit-attention-peak",
    "Largest product q·k, at the tensor `where`.",
    {"peak": "its size", "fused": "whether attention keeps it in FP32"},
)
def _attention_peak(finding: Finding) -> str:
    how = "Fused attention keeps it in FP32." if finding.values["fused"] else "Eager attention makes it in the dtype."
    return f"The largest product q·k is {_magnitude(finding.number('peak'))} at {finding.where}. {how}"


@words(
    "audit-weights-rounded",
    "What conversion to FP16 does to the weights; `where` is the tensor that it keeps worst.",
    {
        "error": "relative error of that tensor",
        "n": "weights",
        "n_overflow": "weights that become infinite",
        "n_flushed": "weights that become 0",
        "n_subnormal": "weights that lose digits",
        "n_nonfinite": "weights that are not finite to begin with",
    },
)
def _weights_rounded(finding: Finding) -> str:
    text = (
        f"FP16 changes {finding.where} by {number(finding.number('error'), 2)} of its norm. Of "
        f"{count(_n(finding, 'n'))} weights, {count(_n(finding, 'n_overflow'))} overflow, "
        f"{count(_n(finding, 'n_flushed'))} become 0 and {count(_n(finding, 'n_subnormal'))} lose digits."
    )
    broken = _n(finding, "n_nonfinite")
    return f"{text} {count(broken)} are not finite to begin with." if broken else text


_SCALES = {
    "low": "exponent of the smallest loss scale that loses no more than is allowed of any tensor",
    "high": "exponent of the largest that overflows nothing",
    "low_by": "tensor that sets `low`",
    "high_by": "tensor that sets `high`",
    "allowed": "fraction of a tensor's Σ|g| that may be lost",
    "step_tokens": "response tokens that the loss is averaged over",
}


@words("audit-loss-scales", "Loss scales that serve every tensor.", _SCALES)
def _loss_scales(finding: Finding) -> str:
    return f"{_serving(finding)} {_ends(finding)} With twice as many tokens a step, both ends are twice as large."


def _serving(finding: Finding) -> str:
    low, high, tokens = _n(finding, "low"), _n(finding, "high"), count(_n(finding, "step_tokens"))
    return f"Loss scales from 2^{low} to 2^{high} serve every tensor, for a loss averaged over {tokens} tokens."


@words("audit-no-loss-scale", "No loss scale serves every tensor.", _SCALES, "Do not train this model in FP16.")
def _no_loss_scale(finding: Finding) -> str:
    return f"No loss scale serves every tensor. {_ends(finding)}"


def _ends(finding: Finding) -> str:
    return (
        f"Below 2^{_n(finding, 'low')} {finding.text('low_by')} loses more than {percent(finding.number('allowed'))}; "
        f"above 2^{_n(finding, 'high')} {finding.text('high_by')} overflows."
    )


@words(
    "audit-gradient-not-finite",
    "A gradient is not finite in FP32, so no loss scale can serve; `where` is the tensor.",
    fix="Look for the first tensor of the forward pass that is not finite.",
)
def _gradient_not_finite(finding: Finding) -> str:
    return f"No loss scale serves every tensor: the gradient of {finding.where} is not finite in FP32."


@words("audit-no-gradient", "No tensor got a gradient, so no loss scale can be named.")
def _no_gradient(finding: Finding) -> str:
    return "No loss scale can be named: no tensor got a gradient."


@words(
    "audit-first-loss-scale",
    "The first loss scale that is recommended.",
    {**_SCALES, "start": "its exponent"},
)
def _first_loss_scale(finding: Finding) -> str:
    return f"Start dynamic loss scaling at 2^{_n(finding, 'start')}. {_serving(finding)}"


_START = {"exponent": "exponent of the usual first loss scale", "skipped": "steps that are skipped before the first"}


@words("audit-scaler-start", "What a dynamic scaler does at its usual first scale; `where` overflows first.", _START)
def _scaler_start(finding: Finding) -> str:
    first = f" {finding.where} overflows first." if finding.where else ""
    skipped = _n(finding, "skipped")
    steps = "no step" if not skipped else "1 step" if skipped == 1 else f"{count(skipped)} steps"
    return f"A dynamic scaler that starts at 2^{_n(finding, 'exponent')} skips {steps} at the start.{first}"


@words("audit-scaler-never-steps", "A dynamic scaler skips every step; `where` overflows first.", _START)
def _scaler_never_steps(finding: Finding) -> str:
    first = f" {finding.where} overflows first." if finding.where else ""
    return f"A dynamic scaler that starts at 2^{_n(finding, 'exponent')} skips every step.{first}"


_PASS = {"n_sequences": "sequences that ran", "mode": "trainer mode"}


@words("audit-pass-finite", "A real pass in FP16 is finite.", {**_PASS, "exponent": "exponent of the loss scale"})
def _pass_finite(finding: Finding) -> str:
    n, mode = count(_n(finding, "n_sequences")), finding.text("mode")
    scale = f"2^{_n(finding, 'exponent')}"
    return (
        f"{n} sequences ran forward and backward in FP16 ({mode}) with every tensor finite, at a loss scale of {scale}."
    )


@words(
    "audit-pass-not-finite",
    "A real pass in FP16 is not finite; `where` is the first tensor.",
    {**_PASS, "way": "`forward` or `backward`"},
    "Do not train this model in FP16.",
)
def _pass_not_finite(finding: Finding) -> str:
    way, mode = finding.text("way"), finding.text("mode")
    return f"The {way} pass in FP16 ({mode}) is not finite, first at {finding.where}."


@words(
    "audit-pass-of-other-mode",
    "The pass in FP16 was made in another trainer mode.",
    {"mode": "of the pass", "wanted": "of the pair"},
)
def _pass_of_other_mode(finding: Finding) -> str:
    return f"The pass in FP16 was made in trainer mode {finding.text('mode')}, not {finding.text('wanted')}."


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
    n = _n(finding, "n")
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
    pairs = _n(finding, "n_pairs")
    text = f"No token has a usable log-prob, in {'any of ' + str(pairs) + ' pairs' if pairs > 1 else 'the one pair'}."
    if finding.text("weight"):
        text += f" The weights of {finding.text('weight')} are not finite."
    if finding.text("tensor"):
        return f"{text} In an FP32 forward pass the first tensor that is not finite is {finding.text('tensor')}."
    if finding.values["measured"]:
        return f"{text} In an FP32 forward pass every tensor is finite."
    return f"{text} The first tensor that is not finite is not known: activations were not measured."


_BEST = {
    "rollout": "its rollout dtype",
    "trainer": "its trainer dtype",
    "mode": "its trainer mode",
    "verdict": "its verdict",
    "gap": "its mean |d|, nats",
}


@words("audit-best-precision", "The precision pair that is recommended, or the best candidate.", _BEST)
def _best_precision(finding: Finding) -> str:
    name, gap = _best(finding), finding.metric("gap")
    size = "" if gap.value is None else f" Its mean |d| is {_said(gap, 'nats')}."
    if finding.text("verdict") == "inconclusive":
        return f"{name} is the best candidate, and is inconclusive.{size}"
    return f"Run {name}.{size}"


@words("audit-no-precision", "Every precision that ran fails; the values are those of the closest.", _BEST)
def _no_precision(finding: Finding) -> str:
    return f"Recommend no precision: the best pair, {_best(finding)}, fails."


def _best(finding: Finding) -> str:
    rollout, trainer = (dtype_label(finding.text(side)) for side in ("rollout", "trainer"))
    mode = f" ({finding.text('mode')})" if finding.text("mode") == "autocast" else ""
    return (
        f"{rollout} on both sides{mode}"
        if rollout == trainer
        else f"{rollout} rollouts with an {trainer} trainer{mode}"
    )


_CORRECTION = {
    "length": "planned response length, tokens",
    "ess": "predicted ESS of sequence weights, fraction of the sequences",
    "correction": "its name",
    "low": "lower bound of the weight",
    "high": "upper bound of the weight",
    "touched": "fraction of tokens that it touches at the observed length",
    "capped": "fraction of tokens that truncated token weights touch",
}


@words("audit-no-correction-of-a-fault", "No correction is recommended: it would hide what fails.")
def _no_correction_of_a_fault(finding: Finding) -> str:
    return "Use no importance correction: it would hide what fails."


@words("audit-no-correction-needed", "Sequence weights are nearly 1.", _CORRECTION)
def _no_correction_needed(finding: Finding) -> str:
    return f"Use no importance correction: sequence weights are nearly 1. {_ess(finding)}"


@words("audit-sequence-weights-unknown", "Whether sequence weights serve is not known.", _CORRECTION)
def _sequence_weights_unknown(finding: Finding) -> str:
    why = _why_of_ess(finding)
    return f"{_cap(finding)} Whether sequence weights serve at {count(_n(finding, 'length'))} tokens is not known{why}."


@words("audit-sequence-weights-serve", "Sequence weights serve.", _CORRECTION)
def _sequence_weights_serve(finding: Finding) -> str:
    return f"Cap sequence weights at {finding.number('high'):g}, which touches {_touched(finding)}. {_ess(finding)}"


@words("audit-sequence-weights-noisy", "Sequence weights are noisy.", _CORRECTION)
def _sequence_weights_noisy(finding: Finding) -> str:
    return (
        f"Mask sequences with a weight above {finding.number('high'):g}, which touches {_touched(finding)}, and more "
        f"at the planned length. Sequence weights are noisy. {_ess(finding)}"
    )


@words("audit-sequence-weights-unusable", "Sequence weights are not usable.", _CORRECTION)
def _sequence_weights_unusable(finding: Finding) -> str:
    return f"{_cap(finding)} The rest of the bias stays: sequence weights are not usable. {_ess(finding)}"


@words("audit-sequence-weights-unreliable", "Sequence weights may not be usable.", _CORRECTION)
def _sequence_weights_unreliable(finding: Finding) -> str:
    return f"{_cap(finding)} The rest of the bias stays: sequence weights may not be usable. {_ess(finding)}"


@words(
    "audit-mask-rather-than-cap",
    "Sequence weights are not usable, and truncated token weights would touch too many tokens.",
    _CORRECTION,
    "Reduce the gap first: run `mismatch-probe attribute`.",
)
def _mask_rather_than_cap(finding: Finding) -> str:
    what = (
        "sequences by their geometric mean" if finding.text("correction") == "geometric" else "tokens by their weight"
    )
    bounds = f"[{finding.number('low'):g}, {finding.number('high'):g}]"
    return (
        f"Mask {what} outside {bounds}, which takes out {_touched(finding)}; capping token weights would touch "
        f"{_fraction(finding.metric('capped'))}. {_ess(finding)} It is better to reduce a gap of this size than to "
        "correct for it."
    )


def _cap(finding: Finding) -> str:
    return f"Cap token weights at {finding.number('high'):g}, which touches {_touched(finding)}."


def _touched(finding: Finding) -> str:
    return f"{_fraction(finding.metric('touched'))} of the tokens"


def _fraction(value: MetricValue) -> str:
    if value.value is None:
        return "an unknown fraction"
    low, high = value.ci_low, value.ci_high
    limits = "" if low is None or high is None else f" [{number(100 * low, 2)}, {number(100 * high, 2)}]"
    return f"{number(100 * value.value, 2)} %{limits}"


def _ess(finding: Finding) -> str:
    value = finding.metric("ess")
    note = f" ({value.why})" if value.why else ""
    return f"Their predicted ESS at {count(_n(finding, 'length'))} tokens is {_said(value)}{note}."


def _why_of_ess(finding: Finding) -> str:
    ess = finding.values.get("ess")
    return f": {ess.why}" if isinstance(ess, MetricValue) and ess.why else ""


@words(
    "audit-engine-lag",
    "How far a 16-bit engine lags behind FP32 masters.",
    {
        "dtype": "of the engine",
        "gap": "mean |d| that the lag makes, nats",
        "rate": "learning rate",
        "steps": "median steps in one direction until a weight's change reaches the engine",
    },
)
def _engine_lag(finding: Finding) -> str:
    dtype, gap = dtype_label(finding.text("dtype")), _said(finding.metric("gap"), "nats")
    text = f"The {dtype} engine lags behind FP32 masters by a mean |d| of {gap}"
    steps = finding.maybe("steps")
    if steps is None:
        return f"{text}."
    return (
        f"{text}. At a learning rate of {finding.number('rate'):g} a weight's change reaches it after {steps:,.0f} "
        "steps in one direction (median), and later where gradients are noise."
    )


@words(
    "audit-expected-kl",
    "KL per token before the first update, and where to raise an alarm.",
    {
        "metric": "which estimate",
        "value": "KL, nats",
        "alarm": "nats",
        "factor": "alarm over the upper limit of the value",
    },
)
def _expected_kl(finding: Finding) -> str:
    name = "exact KL" if finding.text("metric") == "kl_exact" else "KL k3"
    value, alarm = _said(finding.metric("value"), "nats"), number(finding.number("alarm"), 2)
    return (
        f"Raise an alarm when the {name} per token exceeds {alarm} nats, {finding.number('factor'):g} times the upper "
        f"limit of today's {value}. Rounding does not grow."
    )


@words("audit-pair-gone", "A pair of the baseline was usable and is gone.")
def _pair_gone(finding: Finding) -> str:
    return "the pair is gone"


@words("audit-verdict-worse", "A verdict is worse than in the baseline.", {"before": "verdict then", "after": "now"})
def _verdict_worse(finding: Finding) -> str:
    return f"{finding.text('before')} before, {finding.text('after')} now"


@words(
    "audit-value-worse-by-factor", "A value is worse than in the baseline.", {"factor": "by at least how many times"}
)
def _value_worse_by_factor(finding: Finding) -> str:
    return f"worse by at least {finding.number('factor'):.2f} times"


@words(
    "audit-value-worse-by", "A value is worse than in the baseline.", {"amount": "by at least how much, in its unit"}
)
def _value_worse_by(finding: Finding) -> str:
    return f"worse by at least {number(finding.number('amount'))}"


@words("audit-trl-serves-apart", "TRL has no key for vLLM's dtype.", {"dtype": "that is recommended"})
def _trl_serves_apart(finding: Finding) -> str:
    dtype = finding.text("dtype")
    flag = f" --dtype {dtype}" if dtype else ""
    return f"TRL has no key for vLLM's dtype: start its server with `trl vllm-serve --model MODEL{flag}`."


@words("audit-trl-trains-under-autocast", "TRL trains under autocast, and the trainer mode cast was audited.")
def _trl_trains_under_autocast(finding: Finding) -> str:
    return (
        "TRL trains under autocast with FP32 masters; this audit is of cast. Audit with --trainer-mode autocast, too."
    )


@words("audit-trl-has-no-correction", "TRL does not offer a correction.", {"correction": "its name"})
def _trl_has_no_correction(finding: Finding) -> str:
    return f"TRL has no correction of this kind: {CORRECTIONS[finding.text('correction')].title}."


_SCALE = {"scale": "first loss scale that is recommended", "usual": "the framework's own"}


@words("audit-trl-sets-no-loss-scale", "TRL has no key for the first loss scale.", _SCALE)
def _trl_sets_no_loss_scale(finding: Finding) -> str:
    scale = f"{finding.number('scale'):g}"
    return f"TRL has no key for the first loss scale: give accelerate a GradScalerKwargs(init_scale={scale})."


@words("audit-fsdp-mixed-precision", "FSDP takes its precision from mixed_precision.")
def _fsdp_mixed_precision(finding: Finding) -> str:
    return "FSDP takes its precision from mixed_precision; fsdp_config.dtype changes nothing there."


@words("audit-fsdp-sets-no-loss-scale", "FSDP has no key for the first loss scale.", _SCALE)
def _fsdp_sets_no_loss_scale(finding: Finding) -> str:
    scale, usual = f"{finding.number('scale'):g}", f"{finding.number('usual'):g}"
    return f"FSDP has no key for a first loss scale of {scale}; it backs off from {usual}."


@words("audit-vllm-processed-logprobs", "vLLM returns log-probs of the sampling distribution.")
def _vllm_processed_logprobs(finding: Finding) -> str:
    return "Log-probs are those of the sampling distribution."
