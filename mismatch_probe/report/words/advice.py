"""Words of an audit's recommendations and baseline, and of what frameworks have no key for."""

from __future__ import annotations

from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.corrections import CORRECTIONS
from mismatch_probe.report.format import count, number
from mismatch_probe.report.words import words
from mismatch_probe.report.words.audit import said
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

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
    size = "" if gap.value is None else f" Its mean |d| is {said(gap, 'nats')}."
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
    length, why = count(finding.whole("length")), _why_of_ess(finding)
    return f"{_cap(finding)} Whether sequence weights serve at {length} tokens is not known{why}."


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
    return f"Their predicted ESS at {count(finding.whole('length'))} tokens is {said(value)}{note}."


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
    dtype, gap = dtype_label(finding.text("dtype")), said(finding.metric("gap"), "nats")
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
    value, alarm = said(finding.metric("value"), "nats"), number(finding.number("alarm"), 2)
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
