"""Words of RL runs and sanity sets."""

from __future__ import annotations

from mismatch_probe.report.format import count, number, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.rl_run import COLLAPSE_BELOW, COLLAPSE_ERRORS

_WINDOW = "steps of a window"
_REWARDS = {
    "steps": "finished steps",
    "window": _WINDOW,
    "start": "mean reward of the first window",
    "end": "mean reward of the last window",
    "change": "end less start, with its 95 % interval",
}
COUNTED = {"n": "how many", "total": "of how many"}
_PARTS = {"mismatch": "mismatch", "staleness": "staleness", "movement": "policy movement"}
_SANITY = {
    "window": _WINDOW,
    "above": "threshold of the mean reward",
    "first_above_step": "last step of the first window that would have passed, None where none would",
}
_COUNTS = {
    "kept": "problems kept",
    "tried": "problems tried",
    "low": "lower bound of the accuracy, a fraction",
    "high": "upper bound",
    "n_samples": "responses to each problem",
}


def steps(n: float) -> str:
    """`1 step`, `60 steps`."""
    return f"{count(int(n))} step{'' if n == 1 else 's'}"


def collapse_rule(window: int) -> str:
    """The rule of collapse."""
    below = {0.5: "half"}.get(COLLAPSE_BELOW, percent(COLLAPSE_BELOW))
    return (
        f"A run has collapsed when the mean reward of its last {window} steps is below {below} of the best mean of "
        f"{window} earlier steps, and the drop exceeds {COLLAPSE_ERRORS:g} standard errors."
    )


def _rewards(found: Finding) -> str:
    """`from 0.310 to 0.620 (first and last 10 steps), change 0.310 [0.2, 0.4]`."""
    return (
        f"from {number(found.maybe('start'))} (first {steps(found.number('window'))}) to "
        f"{number(found.maybe('end'))} (last {found.number('window')}), change {in_line(found.metric('change'))}"
    )


@words(
    "rl-reward-rose",
    "The run ended as planned, and its reward rose by more than noise.",
    _REWARDS,
)
def _rose(found: Finding) -> str:
    return f"The run completed {steps(found.number('steps'))} and learned: mean reward rose {_rewards(found)}."


@words(
    "rl-reward-flat",
    "The run ended as planned, and its reward did not change by more than noise.",
    _REWARDS,
    fix="If the reward can still rise, train for more steps or raise the learning rate.",
)
def _flat(found: Finding) -> str:
    return (
        f"The run completed {steps(found.number('steps'))}; mean reward did not change by more than noise: it went "
        f"{_rewards(found)}."
    )


@words(
    "rl-reward-fell",
    "The run ended as planned, and its reward fell by more than noise, by less than a collapse.",
    _REWARDS,
    fix="Lower the learning rate; train in FP32 to see whether precision is the cause.",
)
def _fell(found: Finding) -> str:
    return (
        f"The run completed {steps(found.number('steps'))}; mean reward fell {_rewards(found)}. The fall is smaller "
        "than a collapse."
    )


@words(
    "rl-reward-unknown",
    "The run ended as planned, after too few steps to tell whether it learned.",
    _REWARDS,
    fix="Train for more steps.",
)
def _unknown(found: Finding) -> str:
    if found.maybe("end") is None:
        return f"The run completed {steps(found.number('steps'))}. Too few to tell whether it learned."
    return (
        f"The run completed {steps(found.number('steps'))}, too few to tell whether it learned: mean reward "
        f"{number(found.maybe('start'))} at the start and {number(found.maybe('end'))} at the end."
    )


@words(
    "rl-unfinished",
    "The run has not ended.",
    {"steps": "finished steps", "planned": "planned steps"},
    fix="Continue it with `rl run --resume`.",
)
def _unfinished(found: Finding) -> str:
    return f"The run has not ended: {count(found.whole('steps'))} of {steps(found.number('planned'))} are done."


@words(
    "rl-collapsed",
    "The collapse rule ended the run.",
    {
        "step": "last step",
        "best": "best mean reward of a window",
        "best_step": "last step of that window",
        "present": "mean reward of the last window",
        "window": _WINDOW,
    },
    fix="Train in FP32 to see whether precision is the cause; else lower the learning rate.",
)
def _collapsed(found: Finding) -> str:
    window = found.number("window")
    return (
        f"The run collapsed at step {found.number('step')}: mean reward of {steps(window)} fell from "
        f"{found.number('best'):.3f} (to step {found.number('best_step')}) to {found.number('present'):.3f}."
    )


@words(
    "rl-not-finite",
    "A loss or a gradient is not finite, and there is no loss scale to lower.",
    {"step": "step that failed", "what": "the first tensor or number that is not finite"},
    fix="Replay `failure/batch.parquet`; lower the learning rate, or train in FP32.",
)
def _not_finite(found: Finding) -> str:
    return f"The run diverged at step {found.number('step')}: {found.text('what')} is not finite."


@words(
    "rl-impossible-logprob",
    "A log-prob is not finite, or has a value that no token has.",
    {
        "step": "step that failed",
        "side": "`rollout` or `trainer`",
        "sequence": "index of the sequence in the batch",
        "position": "response token",
        "value": "the log-prob, nats; None where it is not finite",
        "tensor": "the first weight that is not finite, None where all are",
    },
    fix="Replay `failure/batch.parquet`; where all weights are finite, look at the engine's output.",
)
def _impossible(found: Finding) -> str:
    value = found.maybe("value")
    wrong = "is not finite" if value is None else f"is {value:g} nats, which no token has"
    weights = f"The weight {found.text('tensor')} is not finite" if found.text("tensor") else "All weights are finite"
    return (
        f"The run diverged at step {found.number('step')}: the {found.text('side')} log-prob of sequence "
        f"{found.number('sequence')} at position {found.number('position')} {wrong}. {weights}."
    )


@words(
    "rl-loss-scale-lost",
    "FP16 gradients overflow at every loss scale down to the minimum.",
    {"step": "last step", "loss_scale": "loss scale after it", "minimum": "the configured minimum"},
    fix="Train in BF16 or FP32.",
)
def _loss_scale(found: Finding) -> str:
    return (
        f"The run diverged at step {found.number('step')}: the loss scale fell to {found.number('loss_scale'):g}, "
        f"below the minimum of {found.number('minimum'):g}."
    )


@words(
    "rl-no-signal",
    "All rewards have been equal for many steps.",
    {"step": "last step", "n_steps": "how many steps"},
    fix="Choose problems that the model solves sometimes: `rl sanity-set`.",
)
def _no_signal(found: Finding) -> str:
    return (
        f"All rewards have been equal for {steps(found.number('n_steps'))} up to step {found.number('step')}: there is "
        "no signal to learn from."
    )


@words(
    "rl-gap",
    "Size of the mismatch at the start and at the end of a run.",
    {
        "window": _WINDOW,
        "start": "mean |Δ log-prob| of the first window, nats",
        "end": "the same of the last window",
        "ess_start": "ESS of sequences over their number, first window",
        "ess_end": "the same of the last window",
    },
)
def _gap(found: Finding) -> str:
    ess = ""
    if found.maybe("ess_start") is not None and found.maybe("ess_end") is not None:
        ess = f"; sequence ESS {percent(found.maybe('ess_start'))} and {percent(found.maybe('ess_end'))}"
    return (
        f"Mismatch, mean |Δ log-prob|: {number(found.number('start'))} nats in the first "
        f"{steps(found.number('window'))}, {number(found.number('end'))} nats in the last{ess}."
    )


@words("rl-gap-unmeasured", "No step has a response token to measure the mismatch at.")
def _gap_unmeasured(_: Finding) -> str:
    return "The mismatch was not measured: no finished step has a response token."


@words(
    "rl-gap-source",
    "What separates the sampling policy from the updated one, over the last steps.",
    {
        "mismatch": "mean |Δ log-prob| of engine and trainer with equal weights, nats",
        "staleness": "mean |Δ log-prob| of older and present weights in the trainer, nats",
        "movement": "mean |Δ log-prob| that the step's own updates made, nats",
        "window": _WINDOW,
        "largest": "the largest of the three",
    },
)
def _source(found: Finding) -> str:
    parts = ", ".join(f"{_PARTS[name]} {number(found.number(name))}" for name in _PARTS)
    return (
        f"From sampling to update, in the last {steps(found.number('window'))}, the largest part is "
        f"{_PARTS[found.text('largest')]} (mean |Δ log-prob| in nats: {parts})."
    )


@words(
    "rl-injected-stress",
    "Stress was injected on the rollout side.",
    {"structure": "kind of stress", "dose": "its size"},
)
def _stress(found: Finding) -> str:
    return f"Stress {found.text('structure')} {found.number('dose'):g}: injected stress, not precision."


@words("rl-sanity-passed", "The sanity test is passed.", _SANITY)
def _passed(found: Finding) -> str:
    return (
        f"Sanity test passed: the lower 95 % limit of the mean reward over the last {steps(found.number('window'))} is "
        f"above {percent(found.number('above'))}."
    )


@words("rl-sanity-missed", "The sanity test is not passed.", _SANITY)
def _missed(found: Finding) -> str:
    first = found.maybe("first_above_step")
    earlier = "" if first is None else f" An earlier window, up to step {first}, was above."
    return (
        f"Sanity test not passed: the lower 95 % limit of the mean reward over the last "
        f"{steps(found.number('window'))} is not above {percent(found.number('above'))}.{earlier}"
    )


@words(
    "rl-sanity-short",
    "The run has fewer steps than the sanity test needs.",
    {"steps": "finished steps", "window": "steps that the test needs"},
    fix="Train for more steps.",
)
def _short(found: Finding) -> str:
    return f"Sanity test not possible: it needs {steps(found.number('window'))}, the run has {found.number('steps')}."


@words(
    "rl-healthy-checkpoint",
    "The newest checkpoint before the run went wrong.",
    {"checkpoint": "its folder, None where none was written"},
)
def _healthy(found: Finding) -> str:
    name = found.text("checkpoint")
    return f"Last healthy checkpoint: checkpoints/{name}." if name else "No healthy checkpoint was written."


@words(
    "rl-sync-unchecked",
    "Weight syncs were not checked.",
    fix="Set check_sync = true.",
)
def _unchecked(_: Finding) -> str:
    return "Weight syncs were not checked: whether the engine had the trainer's weights is unknown."


@words("rl-updates-skipped", "Updates were skipped because FP16 gradients overflowed.", COUNTED)
def _skipped(found: Finding) -> str:
    return f"{n_of_total(found)} updates were skipped because gradients overflowed in FP16."


@words("rl-grader-killed", "Responses count as wrong because their grader did not end.", COUNTED)
def _killed(found: Finding) -> str:
    return f"{n_of_total(found)} responses count as wrong because their grader was stopped."


@words("rl-empty-responses", "Responses without a token.", COUNTED)
def _empty(found: Finding) -> str:
    return f"{n_of_total(found)} responses have no token."


def n_of_total(found: Finding) -> str:
    return f"{count(found.whole('n'))} of {count(found.whole('total'))}"


@words(
    "sanity-kept",
    "Problems were kept whose accuracy lies within the bounds: an RL run that is sound must learn all of them.",
    _COUNTS,
    "Train on the set: `rl run` passes where the lower limit of its reward exceeds `pass_above`.",
)
def _kept(finding: Finding) -> str:
    return f"Kept {finding.number('kept'):,.0f} of {_bounds(finding)}."


@words(
    "sanity-nothing-kept",
    "No problem has an accuracy within the bounds, so there is nothing to train on.",
    _COUNTS,
    "Raise the response budget where most responses are truncated. Otherwise try easier or harder problems.",
)
def _nothing(finding: Finding) -> str:
    return f"Kept none of {_bounds(finding)}."


def _bounds(finding: Finding) -> str:
    low, high = (percent(finding.number(name)) for name in ("low", "high"))
    samples = finding.number("n_samples")
    return f"{finding.number('tried'):,.0f} problems: accuracy from {low} to {high} over {samples:,.0f} responses each"


@words(
    "sanity-accuracy",
    "The accuracy of the kept problems, without the bias of having been chosen by it.",
    {
        "as_sampled": "mean accuracy by the samples that chose the problems, a fraction",
        "estimate": "the same by samples that had no part in the choice",
    },
)
def _accuracy(finding: Finding) -> str:
    sampled = percent(finding.number("as_sampled"))
    return (
        f"Expect a reward of {in_line(finding.metric('estimate'))} at the first step: the kept problems' {sampled} as "
        "sampled includes the luck of having been chosen."
    )


@words(
    "sanity-truncated",
    "Most responses used up their budget and count as wrong.",
    {"fraction": "fraction of the responses that are truncated"},
    "Raise --max-tokens.",
)
def _truncated(finding: Finding) -> str:
    return f"{percent(finding.number('fraction'))} of the responses used up their budget and count as wrong."


@words(
    "sanity-grader-stopped",
    "Responses were graded 0 because their grader had to be stopped.",
    {"responses": "how many"},
    "See whether the problems' answers are well-formed.",
)
def _stopped(finding: Finding) -> str:
    return f"Graded 0 because their grader was stopped: {finding.number('responses'):,.0f} responses."
