"""Words of an audit's findings on the model itself: activations, weights, gradients, loss scales, a pass in FP16."""

from __future__ import annotations

from mismatch_probe.metrics.floats import FP16
from mismatch_probe.report.format import count, magnitude, number, percent
from mismatch_probe.report.words import words
from mismatch_probe.report.words.audit import UPPER, unseen
from mismatch_probe.results.finding import Finding

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
        text += f" {count(finding.whole('n_nonfinite'))} peaks are not finite in FP32 either, first at {broken}."
    return text


def _largest(finding: Finding) -> str:
    position = finding.maybe("position")
    token = "" if position is None else f", token {int(position)} of a sequence"
    return f"The largest activation is {magnitude(finding.number('peak'))} at {finding.text('tensor')}{token}"


def _seen(finding: Finding) -> str:
    return f"FP16 ends at {FP16.largest:,.0f}; the longest context seen is {count(finding.whole('longest'))} tokens."


@words(
    "audit-overflow-tokens",
    "Tokens with an activation that FP16 rounds to infinity; `where` is the first tensor.",
    {"n": "such tokens", "n_tokens": "tokens", "n_prompts_hit": "prompts with one", "n_prompts": "prompts", **UPPER},
)
def _overflow_tokens(finding: Finding) -> str:
    n, tokens = finding.whole("n"), count(finding.whole("n_tokens"))
    text = f"{count(n)} of {tokens} tokens have an activation of {FP16.overflows_from:,.0f} or more"
    if not n:
        return f"{text}{unseen(finding)}."
    prompts = f"{count(finding.whole('n_prompts_hit'))} of {count(finding.whole('n_prompts'))} prompts"
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
    return f"The largest product q·k is {magnitude(finding.number('peak'))} at {finding.where}. {how}"


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
        f"{count(finding.whole('n'))} weights, {count(finding.whole('n_overflow'))} overflow, "
        f"{count(finding.whole('n_flushed'))} become 0 and {count(finding.whole('n_subnormal'))} lose digits."
    )
    broken = finding.whole("n_nonfinite")
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
    low, high, tokens = finding.whole("low"), finding.whole("high"), count(finding.whole("step_tokens"))
    return f"Loss scales from 2^{low} to 2^{high} serve every tensor, for a loss averaged over {tokens} tokens."


@words("audit-no-loss-scale", "No loss scale serves every tensor.", _SCALES, "Do not train this model in FP16.")
def _no_loss_scale(finding: Finding) -> str:
    return f"No loss scale serves every tensor. {_ends(finding)}"


def _ends(finding: Finding) -> str:
    allowed = percent(finding.number("allowed"))
    return (
        f"Below 2^{finding.whole('low')} {finding.text('low_by')} loses more than {allowed}; above "
        f"2^{finding.whole('high')} {finding.text('high_by')} overflows."
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
    return f"Start dynamic loss scaling at 2^{finding.whole('start')}. {_serving(finding)}"


_START = {"exponent": "exponent of the usual first loss scale", "skipped": "steps that are skipped before the first"}


@words("audit-scaler-start", "What a dynamic scaler does at its usual first scale; `where` overflows first.", _START)
def _scaler_start(finding: Finding) -> str:
    first = f" {finding.where} overflows first." if finding.where else ""
    skipped = finding.whole("skipped")
    steps = "no step" if not skipped else "1 step" if skipped == 1 else f"{count(skipped)} steps"
    return f"A dynamic scaler that starts at 2^{finding.whole('exponent')} skips {steps} at the start.{first}"


@words("audit-scaler-never-steps", "A dynamic scaler skips every step; `where` overflows first.", _START)
def _scaler_never_steps(finding: Finding) -> str:
    first = f" {finding.where} overflows first." if finding.where else ""
    return f"A dynamic scaler that starts at 2^{finding.whole('exponent')} skips every step.{first}"


_PASS = {"n_sequences": "sequences that ran", "mode": "trainer mode"}


@words("audit-pass-finite", "A real pass in FP16 is finite.", {**_PASS, "exponent": "exponent of the loss scale"})
def _pass_finite(finding: Finding) -> str:
    n, mode = count(finding.whole("n_sequences")), finding.text("mode")
    scale = f"2^{finding.whole('exponent')}"
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
