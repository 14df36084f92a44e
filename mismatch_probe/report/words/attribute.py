"""Words of `attribute`: where a gap arises, and what each setting has to do with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mismatch_probe.metrics.inside import ENDLESS
from mismatch_probe.report.format import count, number, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import all_words, words
from mismatch_probe.types import MetricValue

if TYPE_CHECKING:
    from mismatch_probe.results.attribution import Attribution, PassKey, Where
    from mismatch_probe.results.finding import Finding

# From here on a fraction is written as other numbers are.
_LARGE_FRACTION = 10.0
# What rounds to 0.0 %.
_LEAST = 5e-4
SETTINGS = {"fp32-head": "FP32 head", "float16": "FP16", "kv-fp8": "FP8 keys and values"}
"""Settings of both sides, by key."""
PASSES: dict[PassKey, str] = {
    "sampled": "the engine as it sampled",
    "prefill": "the engine by prefill",
    "rollout-dtype": "the trainer in the rollout's dtype, batched as the rollout",
    "rollout-batching": "the trainer, batched as the rollout",
    "cast": "the trainer cast, as it is laid out",
    "trained": "the trainer as it is trained",
}
"""Passes of the ladder, by key."""
PLACES: dict[Where, str] = {
    "neither": "neither side",
    "rollout": "rollout alone",
    "trainer": "trainer alone",
    "both": "both sides",
}
"""Where a setting of both sides is set."""
_BATCH = "Use batch-invariant kernels (CUDA), or correct by importance weights."
_ADVICE = {
    "prefill": "Use batch-invariant kernels (CUDA), or score rollouts by prefill.",
    "dtype": "Give both sides the same dtype.",
    "layout": "Score as the trainer batches, or correct by importance weights.",
    "mode": "Check whether mode cast serves as well.",
    "batch-1": _BATCH,
    "prefill-alone": _BATCH,
    "prefix-cache": "Reset the prefix cache after each weight update, or turn it off.",
    "chunked-prefill": "Keep the chunk size the same wherever log-probs are compared.",
    "eager": "Run rollouts in eager mode.",
    "kv-fp8": "Keep the KV cache in the model's dtype, or round keys and values at the trainer as the cache does.",
    "fp32-head": "Give both sides an FP32 head (vLLM: hf_overrides={'head_dtype': 'float32'}).",
    "float16": "Run both sides in FP16 if `mismatch-probe audit` allows it.",
    "batch-invariant": "Run vLLM with VLLM_BATCH_INVARIANT=1.",
    "weights-fp8": "Do not quantise the rollout's weights, or correct by importance weights.",
    "weights-int8": "Do not quantise the rollout's weights, or correct by importance weights.",
    "tensor-parallel": "Compare with the tensor-parallel size that rollouts use.",
    "softmax-16": "Upcast logits before the log-softmax.",
    "compiled": "Score as the trainer trains.",
    "tf32": "Call torch.set_float32_matmul_precision('highest').",
}


def rung_label(key: str, document: Attribution) -> str:
    """What changes on a rung."""
    return _rung_label(key, document.rollout_dtype, document.trainer_dtype, document.trainer_layout)


def _rung_label(key: str, rollout_dtype: str, trainer_dtype: str, layout: str) -> str:
    labels = {
        "prefill": "decode → prefill",
        "engine": "rollout engine → trainer",
        "dtype": f"{rollout_dtype} → {trainer_dtype} at the trainer",
        "layout": f"rollout batches → {layout}",
        "mode": "cast → autocast",
    }
    return labels[key]


def advice(key: str) -> str:
    """What to do about a rung, or where a setting matters."""
    default = "Use the setting where it makes the gap smaller."
    return _ADVICE.get(key, "Train as it is set here, if it is closer." if key.startswith("layout-") else default)


def fix_of(finding: Finding) -> str:
    """What to do about a finding."""
    return all_words()[finding.code].fix


def part_text(value: float | None) -> str:
    """A fraction of E[d²], to a tenth of a per cent."""
    return percent(value) if value is None or abs(value) >= _LARGE_FRACTION else f"{100 * value:.1f} %"


def part_interval(metric: MetricValue) -> str:
    """The interval of such a fraction; empty where an end is absent."""
    low, high = metric.ci_low, metric.ci_high
    return "" if low is None or high is None else f"[{part_text(low)}, {part_text(high)}]"


def part_line(metric: MetricValue) -> str:
    """`38.2 % [32.6 %, 43.8 %]`."""
    return f"{part_text(metric.value)} {part_interval(metric)}".rstrip()


def score_text(score: float | None) -> str:
    """A score; `∞` where a tensor is not finite."""
    return "∞" if score is not None and score >= ENDLESS else number(score)


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


# Where the gap arises.

_RUNGS = {
    "rungs": "the rungs, the largest estimate first",
    "contributions": "of each to E[d²], as a fraction",
    "layout": "how the trainer batches",
    "rollout_dtype": "of the pair",
    "trainer_dtype": "of the pair",
}


def _rung(finding: Finding, key: str) -> str:
    about = (finding.text(name) for name in ("rollout_dtype", "trainer_dtype", "layout"))
    return f"{_rung_label(key, *about)} ({part_line(finding.metrics('contributions')[key])} of E[d²])"


@words("arises-at-rung", "One rung of the ladder makes more of the gap than any other, by its interval.", _RUNGS)
def _(finding: Finding) -> str:
    return f"The largest part of the gap arises at {_rung(finding, finding.where)}."


@words(
    "arises-undecided",
    "The intervals of the largest rungs overlap: none can be called the largest.",
    _RUNGS,
    "More prompts make the intervals narrower.",
)
def _(finding: Finding) -> str:
    rungs = "; ".join(_rung(finding, key) for key in finding.names("rungs"))
    return f"Which rung makes the largest part of the gap is open, since the intervals overlap: {rungs}."


@words(
    "arises-by-estimate",
    "The rung with the largest estimate has no interval.",
    _RUNGS,
    "More prompts give an interval.",
)
def _(finding: Finding) -> str:
    return f"The rung with the largest estimate is {_rung(finding, finding.where)}; there is no interval."


@words("no-ladder", "The rungs could not be computed.", {"why": "the reason"}, "Run the missing passes.")
def _(finding: Finding) -> str:
    return f"Where the gap arises is not known: {finding.text('why') or 'no rung has a contribution'}."


@words("no-gap", "Both sides give every token the same log-prob.", {"tokens": "response tokens"})
def _(finding: Finding) -> str:
    return f"There is no gap: both sides give all {count(finding.whole('tokens'))} tokens the same log-prob."


@words("gap-not-known", "The gap has no value.", {"why": "the reason"}, "See the comparison's report.")
def _(finding: Finding) -> str:
    return f"The gap is not known: {finding.text('why')}."


# Rounding.

_LEFT = {"left": "fraction of E[d²] that FP32 on both sides leaves", "left_rms": "RMS of that, nats"}


def _left(finding: Finding) -> str:
    """What FP32 on both sides leaves."""
    left, rms = finding.metric("left"), finding.metric("left_rms")
    part = "less than 0.1 %" if left.value is not None and left.value < _LEAST else part_line(left)
    return f"FP32 on both sides leaves {part} of E[d²], an RMS of {number(rms.value)} nats"


@words(
    "rounding-explains",
    "FP32 on both sides leaves next to nothing of the gap, or no more than FP32 itself rounds.",
    _LEFT,
    "Use a dtype with more significant bits on both sides (FP16, if `mismatch-probe audit` allows it), or token-level "
    "importance weights.",
)
def _(finding: Finding) -> str:
    if finding.values["left"] is None:
        return "Rounding explains the gap: at the end of the layers the models differ by no more than FP32 rounds."
    return f"Rounding explains the gap: {_left(finding)}."


@words(
    "rounding-explains-part",
    "FP32 on both sides leaves a part of the gap, which is not rounding.",
    _LEFT,
    "Fix that part first. A dtype with more significant bits on both sides makes the rest smaller.",
)
def _(finding: Finding) -> str:
    return f"Rounding explains only part of the gap: {_left(finding)}, more than FP32 rounds."


@words(
    "rounding-does-not-explain",
    "The gap is there in FP32 as well.",
    _LEFT,
    "Find where both sides compute different functions; no dtype fixes that.",
)
def _(finding: Finding) -> str:
    if finding.values["left"] is None:
        return "Rounding does not explain the gap: the models differ by more than FP32 rounds."
    return f"Rounding does not explain the gap: {_left(finding)}."


@words(
    "fault-before-rounding",
    "FP32 leaves next to nothing of the gap, but something that FP32 does not show stands out in the pair's dtypes.",
    _LEFT,
    "Fix what stands out and measure again.",
)
def _(finding: Finding) -> str:
    return f"How much of the gap rounding explains is open while something stands out in its dtypes; {_left(finding)}."


@words(
    "rounding-not-known",
    "Nothing tells how much of the gap is rounding.",
    {**_LEFT, "why": "why FP32 was not measured; empty where a router may have sent tokens elsewhere in FP32 as well"},
    "Look at layers in float32 (--layer-dtypes float32), with a float32 trainer in the comparison.",
)
def _(finding: Finding) -> str:
    text = "Whether rounding explains the gap is not known"
    if finding.text("why"):
        return f"{text}: {finding.text('why')}."
    if finding.values["left"] is None:
        return f"{text}: the layers in float32 do not tell."
    return f"{text}: {_left(finding)}, and a router may have sent tokens to other experts in FP32, too."


# Inside both models.


# Settings.

_CLOSED = {"closed": "fraction of E[d²] that is gone with it"}


@words(
    "setting-closes-gap",
    "A setting of one side makes the gap smaller, tested together with all others (Holm, 5 %).",
    {**_CLOSED, "change": "the setting", "side": "rollout or trainer"},
    "Use the setting if it can be afforded.",
)
def _(finding: Finding) -> str:
    closed = part_line(finding.metric("closed"))
    return f"{finding.text('change')} at the {finding.text('side')} closes {closed} of E[d²]."


@words(
    "both-sides-close-gap",
    "A setting on both sides makes the gap smaller than on one or on neither.",
    _CLOSED,
    "Use the setting on both sides.",
)
def _(finding: Finding) -> str:
    name = SETTINGS.get(finding.where, finding.where)
    return f"{name} on both sides closes {part_line(finding.metric('closed'))} of E[d²]."


@words("no-setting-closes-gap", "No measured setting makes the gap smaller.", {"settings": "measured settings"})
def _(finding: Finding) -> str:
    return (
        f"None of {count(finding.whole('settings'))} measured settings makes the gap smaller (5 % for all of "
        "them together)."
    )


@words(
    "settings-not-tested",
    "Too few prompts to test whether a setting makes the gap smaller.",
    {"settings": "measured settings"},
    "Compare at least 16 prompts.",
)
def _(finding: Finding) -> str:
    return (
        f"Whether one of {count(finding.whole('settings'))} measured settings makes the gap smaller is not "
        "tested: there are too few prompts."
    )


@words(
    "attention-changed-too",
    "vLLM or the trainer chose another attention kernel with the setting.",
    {"before": "the kernel without it", "after": "the kernel with it"},
)
def _(finding: Finding) -> str:
    return f"attention changed with it: {finding.text('before')} → {finding.text('after')}"


@words("prefix-cache-in-blocks", "The prefix cache holds whole blocks only.", {"tokens": "tokens of a block"})
def _(finding: Finding) -> str:
    return f"only whole blocks of {finding.text('tokens')} tokens are cached"


# Routers.

_ROUTES = {
    "flipped": "fraction of tokens that a router sends elsewhere",
    "contribution": "of those tokens to E[d²]",
    "rms_ratio": "RMS of the gap with the engine's routes over that with the trainer's own",
    "closed": "fraction of E[d²] that is gone with the engine's routes",
}


def _routers(finding: Finding) -> str:
    contribution = finding.metric("contribution")
    return (
        f"Routers disagree on {percent(finding.maybe('flipped'))} of the tokens, which make "
        f"{part_line(contribution)} of E[d²] against the engine by prefill"
    )


@words(
    "routes-close-gap",
    "The engine's routes make the trainer's gap smaller.",
    _ROUTES,
    "Replay the engine's routes in the trainer (R3), or freeze routers; FP32 routers agree more often.",
)
def _(finding: Finding) -> str:
    return f"{_routers(finding)}. With the engine's routes {part_line(finding.metric('closed'))} of E[d²] is gone."


@words("routers-compared", "Whether the engine's routes make the gap smaller is not shown.", _ROUTES)
def _(finding: Finding) -> str:
    ratio = finding.metric("rms_ratio")
    return f"{_routers(finding)}. The engine's routes do not make that gap smaller: ratio {in_line(ratio)}."


# FP32 modules.

_FIXES = {
    "target": "largest fraction of the gap's RMS that may be left",
    "whole": "ratio of the RMS that a trainer wholly in FP32 leaves",
    "classes": "classes of modules",
    "left": "fraction of the gap's RMS that they leave",
    "added_time": "as a fraction of the trainer's",
}


def _whole(finding: Finding) -> str:
    if finding.values["whole"] is None:
        return ""
    return f"; a trainer wholly in FP32 leaves {percent(finding.metric('whole').value)}"


@words("fp32-modules-meet-target", "The cheapest set of FP32 modules that meets the target.", _FIXES)
def _(finding: Finding) -> str:
    return (
        f"FP32 modules at the trainer meet the target of {percent(finding.number('target'))} of the RMS of the gap: "
        f"{' + '.join(finding.names('classes'))} leaves {percent(finding.number('left'))} and adds "
        f"{percent(finding.number('added_time'))} of time{_whole(finding)}."
    )


@words("fp32-modules-miss-target", "No set of FP32 modules that was tried meets the target.", _FIXES)
def _(finding: Finding) -> str:
    closest = f"{' + '.join(finding.names('classes'))}, leaves {percent(finding.metric('left').value)}"
    return (
        f"No FP32 modules at the trainer meet the target of {percent(finding.number('target'))} of the RMS of the gap; "
        f"the closest, {closest}{_whole(finding)}."
    )


@words("fp32-trainer-closes-nothing", "A trainer wholly in FP32 does not make the gap smaller.", _FIXES)
def _(finding: Finding) -> str:
    if finding.values["whole"] is None:
        return "No target is set for FP32 modules, so no set of them is looked for."
    left = percent(finding.metric("whole").value)
    return f"A trainer wholly in FP32 leaves {left} of the RMS of the gap, so no set of FP32 modules is looked for."


# Limits.


@words("attribution-intervals-limited", "Something limits the intervals.", {"why": "what"})
def _(finding: Finding) -> str:
    return f"Intervals are {finding.text('why')}."


@words("attribution-tokens-nonfinite", "Tokens are not finite on one side.", {"tokens": "how many"})
def _(finding: Finding) -> str:
    return f"{count(finding.whole('tokens'))} tokens are not finite on one side and are left out."


@words("attribution-tokens-impossible", "Tokens have a value that cannot be a log-prob.", {"tokens": "how many"})
def _(finding: Finding) -> str:
    return f"{count(finding.whole('tokens'))} tokens have an impossible log-prob and are left out."


@words(
    "attribution-pass-failed",
    "A pass of the attribution failed.",
    {"why": "the reason"},
    "Run `attribute --resume`: what failed is tried again.",
)
def _(finding: Finding) -> str:
    return f"{finding.where} failed: {finding.text('why').rstrip('.')}."
