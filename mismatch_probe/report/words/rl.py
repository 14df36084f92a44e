"""Words of RL runs and sweeps."""

from __future__ import annotations

from collections.abc import Sequence

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
# So many arms are named in a sentence; the others stand in a table.
_SEVERAL = 4
_COUNTED = {"n": "how many", "total": "of how many"}


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
    return f"The run has not ended: {count(int(found.number('steps')))} of {steps(found.number('planned'))} are done."


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


_PARTS = {"mismatch": "mismatch", "staleness": "staleness", "movement": "policy movement"}


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


_SANITY = {
    "window": _WINDOW,
    "above": "threshold of the mean reward",
    "first_above_step": "last step of the first window that would have passed, None where none would",
}


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


@words("rl-updates-skipped", "Updates were skipped because FP16 gradients overflowed.", _COUNTED)
def _skipped(found: Finding) -> str:
    return f"{_of(found)} updates were skipped because gradients overflowed in FP16."


@words("rl-grader-killed", "Responses count as wrong because their grader did not end.", _COUNTED)
def _killed(found: Finding) -> str:
    return f"{_of(found)} responses count as wrong because their grader was stopped."


@words("rl-empty-responses", "Responses without a token.", _COUNTED)
def _empty(found: Finding) -> str:
    return f"{_of(found)} responses have no token."


def _of(found: Finding) -> str:
    return f"{count(int(found.number('n')))} of {count(int(found.number('total')))}"


_NEEDED = {"needed": "pairs of runs with equal seeds that a test needs"}
_ARMS = {"arms": "arms, each against its reference"}


@words("sweep-no-run", "No run has ended.", {"planned": "planned runs"}, fix="Continue with `rl sweep --resume`.")
def _no_run(found: Finding) -> str:
    return f"No run has ended yet, of {count(int(found.number('planned')))} planned."


@words("sweep-nothing-to-compare", "Only one arm has runs that ended.")
def _nothing(_: Finding) -> str:
    return "Only one arm has runs that ended: there is nothing to compare."


@words(
    "sweep-one-run-per-arm",
    "Every arm has one run, so nothing was tested.",
    _NEEDED,
    fix="Run more seeds: `rl sweep SWEEP --seeds 8`.",
)
def _one_run(found: Finding) -> str:
    return f"One run per arm: differences may be noise. A test needs {found.number('needed')} seeds."


@words(
    "sweep-arms-differ",
    "Final reward or collapses of some arms differ from their reference by more than noise.",
    {
        "n_comparisons": "comparisons",
        "n_different": "those with a difference",
        "differences": "final reward less that of the reference, by arm",
        "references": "the reference of each of these arms",
        "p": "p-value of the reward, adjusted over the sweep (Holm), by arm",
        "collapses": "counts of collapses that differ",
    },
)
def _arms_differ(found: Finding) -> str:
    p = found.values["p"]
    known = p if isinstance(p, dict) else {}
    by_reference: dict[str, list[str]] = {}
    for (arm, value), reference in zip(found.metrics("differences").items(), found.names("references"), strict=True):
        said = f"{arm} {'+' if (value.value or 0.0) > 0 else ''}{number(value.value)} (p = {_p(known[arm])})"
        by_reference.setdefault(reference, []).append(said)
    parts = [f"Final reward against {name}: {_several(arms)}." for name, arms in by_reference.items()]
    if found.names("collapses"):
        parts.append(f"Collapses: {_several(found.names('collapses'))}.")
    n, total = int(found.number("n_different")), int(found.number("n_comparisons"))
    verb = "differs from its" if n == 1 else "differ from their"
    return f"{n} of {total} arms {verb} reference by more than noise. {' '.join(parts)}"


def _several(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(texts) - _SEVERAL
    return "; ".join(texts[:_SEVERAL]) + (f"; and {more} more" if more > 0 else "")


def _p(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else "–"


@words(
    "sweep-no-difference-shown",
    "Tests were possible, and no arm differs from its reference by more than noise.",
    {
        "n_comparisons": "comparisons",
        "n_reward": "those whose final reward was tested",
        "n_collapse": "those whose collapses were tested",
    },
)
def _no_difference(found: Finding) -> str:
    tested = [
        f"{what} in {found.number(name)}"
        for what, name in (("final reward", "n_reward"), ("collapses", "n_collapse"))
        if found.number(name)
    ]
    n = count(int(found.number("n_comparisons")))
    return f"No arm differs from its reference by more than noise, of {n} comparisons (tested: {', '.join(tested)})."


@words(
    "sweep-untested",
    "Too few seeds for any test.",
    {"pairs": "smallest number of seeds that two arms share", **_NEEDED},
    fix="Run more seeds: `rl sweep SWEEP --seeds 8`.",
)
def _untested(found: Finding) -> str:
    return (
        f"Whether arms differ was not tested: {_seeds(found.number('pairs'))} per pair of arms, "
        f"{found.number('needed')} are needed. Differences may be noise."
    )


def _seeds(n: float) -> str:
    return f"{count(int(n))} shared seed{'' if n == 1 else 's'}"


@words("sweep-runs-healthy", "No run without injected stress collapsed or diverged.", {"total": "runs without stress"})
def _healthy_runs(found: Finding) -> str:
    n = found.number("total")
    return f"No run without injected stress collapsed or diverged ({count(int(n))} run{'' if n == 1 else 's'})."


@words(
    "sweep-runs-lost",
    "Runs without injected stress collapsed or diverged.",
    {"n": "how many", "total": "of how many", "arms": "arms with such runs, and how many"},
    fix="Read the report of one of these runs: `rl report SWEEP/runs/NAME`.",
)
def _runs_lost(found: Finding) -> str:
    return f"{_of(found)} runs without injected stress collapsed or diverged: {_several(found.names('arms'))}."


@words("sweep-no-plain-run", "No run without injected stress has ended.")
def _no_plain(_: Finding) -> str:
    return "No run without injected stress has ended: the sweep shows what stress does, not what precision does."


@words(
    "sweep-difference-not-shown",
    "Tested, and no difference in final reward was shown.",
    {**_ARMS, "detectable": "largest of the true differences that 8 of 10 such sweeps would show"},
)
def _not_shown(found: Finding) -> str:
    return (
        f"No difference in final reward was shown for {_several(found.names('arms'))}. True differences below "
        f"{number(found.number('detectable'), 2)} can be missed: 8 of 10 such sweeps would show one of that size."
    )


@words(
    "sweep-difference-undetectable",
    "Tested, and so few seeds could not have shown any difference.",
    {**_ARMS, "why": "the reason"},
    fix="Run more seeds, or compare fewer arms.",
)
def _undetectable(found: Finding) -> str:
    return f"For {_several(found.names('arms'))} no difference in final reward could be shown: {found.text('why')}."


@words(
    "sweep-few-pairs",
    "Final rewards that were not tested: too few seeds.",
    {**_ARMS, "pairs": "smallest number of shared seeds", **_NEEDED},
    fix="Run more seeds.",
)
def _few_pairs(found: Finding) -> str:
    return (
        f"Final reward was not tested for {_several(found.names('arms'))}: {_seeds(found.number('pairs'))}, "
        f"{found.number('needed')} are needed."
    )


@words(
    "sweep-run-failed",
    "A run could not be trained.",
    {"why": "the error"},
    fix="Remove the cause, then continue with `rl sweep --resume`.",
)
def _run_failed(found: Finding) -> str:
    return f"{found.where} failed: {found.text('why')}"


@words("sweep-arms-unfinished", "No run of these arms has ended.", {"arms": "labels of the arms"})
def _arms_unfinished(found: Finding) -> str:
    return f"No run has ended of: {_several(found.names('arms'))}."


@words("sweep-runs-ended-early", "Runs collapsed or diverged, with or without stress.", _COUNTED)
def _ended_early(found: Finding) -> str:
    return (
        f"{_of(found)} runs collapsed or diverged. The last steps of a collapsed run count as final; a diverged run "
        "counts as 0."
    )


@words("sweep-injected-stress", "Arms with injected stress.")
def _stress_note(_: Finding) -> str:
    return "Stress is injected, not precision: it shows what a mismatch of that size does, not where one comes from."


@words(
    "dose-inconclusive",
    "It cannot be told which measure of the mismatch predicts the reward.",
    {"why": "the reason"},
)
def _dose_inconclusive(found: Finding) -> str:
    return f"Inconclusive whether ESS or mean |Δ log-prob| predicts the final reward better: {found.text('why')}."


_LEFT = {
    "ess_left": "part of the variance of reward between arms that a monotone curve of ESS leaves",
    "gap_left": "the same for mean |Δ log-prob|",
    "difference": "the one less the other, with its 95 % interval",
    "n_arms": "arms",
    "n_seeds": "seeds that all arms have",
    "better": "the measure that leaves less, `ess_seq` or `mean_abs_logprob_diff`",
}
_MEASURES = {"ess_seq": "ESS", "mean_abs_logprob_diff": "mean |Δ log-prob|"}


def _left(found: Finding) -> str:
    return (
        f"ESS leaves {percent(found.number('ess_left'))} of the variance of final reward between "
        f"{found.number('n_arms')} arms unexplained, mean |Δ log-prob| {percent(found.number('gap_left'))} (difference "
        f"{in_line(found.metric('difference'))}, {found.number('n_seeds')} seeds)"
    )


@words("dose-better", "One measure of the mismatch predicts the reward better.", _LEFT)
def _dose_better(found: Finding) -> str:
    return f"{_MEASURES[found.text('better')]} predicts the final reward better: {_left(found)}."


@words("dose-not-told-apart", "Neither measure of the mismatch predicts the reward better by more than noise.", _LEFT)
def _dose_equal(found: Finding) -> str:
    return f"ESS and mean |Δ log-prob| predict the final reward equally well within noise: {_left(found)}."


_MATCHED = {
    "n_pairs": "pairs of arms of unlike structure whose ESS agree",
    "n_tested": "those with enough seeds for a test",
    "n_different": "those whose final reward differs",
    "n_against": "those in which the arm of higher ESS ends lower",
    "detectable": "largest of the detectable differences, None where one is unknown",
}


def _matched(found: Finding) -> str:
    n = found.number("n_pairs")
    return f"{n} pair{'' if n == 1 else 's'} of arms with unlike structure and equal ESS"


@words("ess-alone-no-pairs", "No two arms of unlike structure have equal ESS.", _MATCHED)
def _alone_no_pairs(_: Finding) -> str:
    return "Inconclusive whether ESS alone decides the reward: no two arms of unlike structure have equal ESS."


@words("ess-alone-untested", "Arms of equal ESS have too few seeds for a test.", _MATCHED)
def _alone_untested(found: Finding) -> str:
    return f"Inconclusive whether ESS alone decides the reward: {_matched(found)}, none with enough seeds for a test."


@words("ess-alone-refuted", "An arm of higher ESS ends lower: ESS alone does not decide the reward.", _MATCHED)
def _alone_refuted(found: Finding) -> str:
    return (
        f"ESS alone does not decide the reward: of {_matched(found)}, {found.number('n_different')} of "
        f"{found.number('n_tested')} tested differ in reward, {found.number('n_against')} against the order of their "
        "ESS."
    )


@words("ess-alone-ordered", "Arms of equal ESS differ in reward in the order of the rest of their ESS.", _MATCHED)
def _alone_ordered(found: Finding) -> str:
    return (
        f"Inconclusive whether ESS alone decides the reward: of {_matched(found)}, {found.number('n_different')} of "
        f"{found.number('n_tested')} tested differ in reward, in the order of what is left of their ESS difference."
    )


@words("ess-alone-no-difference", "No tested pair of arms of equal ESS differs in reward.", _MATCHED)
def _alone_no_difference(found: Finding) -> str:
    detectable = found.maybe("detectable")
    size = (
        "how large a difference would have been shown is unknown"
        if detectable is None
        else f"differences below {number(detectable, 2)} can be missed"
    )
    return f"No sign that more than ESS decides: of {_matched(found)}, no tested one differs in reward; {size}."


@words("place-unknown", "A compared model has no place among the arms.", {"why": "the reason"})
def _place_unknown(found: Finding) -> str:
    return f"{found.where} cannot be placed: {found.text('why')}."


@words(
    "place-among-arms",
    "Where a compared model lies among the arms.",
    {
        "predicted": "sequence ESS predicted for the planned length",
        "seen": "what the sequences of one step would show of it",
        "neighbour": "the arm of next lower ESS, None where every arm has a higher one",
    },
)
def _place_among(found: Finding) -> str:
    name = found.text("neighbour")
    beside = f"next above the arm {name}" if name else "below every arm of the sweep"
    return (
        f"{found.where} lies {beside}: its predicted sequence ESS is {in_line(found.metric('predicted'))}, of which a "
        f"step here would show {in_line(found.metric('seen'))}. Another model may react differently."
    )
