"""Words of sweeps of RL runs."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.report.format import count, number, percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.report.words.rl import COUNTED, n_of_total
from mismatch_probe.results.finding import Finding

_NEEDED = {"needed": "pairs of runs with equal seeds that a test needs"}
# So many arms are named in a sentence; the others stand in a table.
_SEVERAL = 4
_ARMS = {"arms": "arms, each against its reference"}


@words("sweep-no-run", "No run has ended.", {"planned": "planned runs"}, fix="Continue with `rl sweep --resume`.")
def _no_run(found: Finding) -> str:
    return f"No run has ended yet, of {count(found.whole('planned'))} planned."


@words("sweep-nothing-to-compare", "Fewer than two arms have a final reward.")
def _nothing(_: Finding) -> str:
    return "Fewer than two arms have a final reward, the mean over a whole window: there is nothing to compare."


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
    n, total = found.whole("n_different"), found.whole("n_comparisons")
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
    n = count(found.whole("n_comparisons"))
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
    return f"{n_of_total(found)} runs without injected stress collapsed or diverged: {_several(found.names('arms'))}."


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


@words("sweep-runs-ended-early", "Runs collapsed or diverged, with or without stress.", COUNTED)
def _ended_early(found: Finding) -> str:
    return (
        f"{n_of_total(found)} runs collapsed or diverged. The last steps of a collapsed run count as final; a diverged "
        "run counts as 0."
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
