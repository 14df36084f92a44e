"""What a sweep's page says in words: sentences made from its numbers, none of which goes beyond them."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.metrics.arms import ArmComparison
from mismatch_probe.metrics.dose import DoseResponse
from mismatch_probe.metrics.seed_tests import MIN_PAIRS
from mismatch_probe.report.format import number, percent
from mismatch_probe.report.rl_data import STRESS_NOTE, ArmPoint, Place
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.types import MetricValue


def reading(
    arms: Sequence[ArmPoint],
    comparisons: Sequence[ArmComparison],
    config: RlConfig,
    response: DoseResponse | None = None,
    places: Sequence[Place] = (),
) -> list[str]:
    """Sentences, the first being the headline; empty where no run has ended."""
    ended = [arm for arm in arms if arm.n_runs]
    if not ended:
        return ["No run has ended yet."]
    found = [_precisions([arm for arm in ended if arm.structure == "none"], config)]
    stressed = [arm for arm in ended if arm.structure != "none"]
    for family, structure in dict.fromkeys((arm.family, arm.structure) for arm in stressed):
        same = [arm for arm in stressed if (arm.family, arm.structure) == (family, structure)]
        found.append(_stress(f"{structure} in {family}", same))
    found += _tests(comparisons, max(arm.n_runs for arm in ended))
    if response is not None:
        found.append(response.verdict)
    found += [_place(place, ended) for place in places]
    return [text for text in found if text]


def _precisions(arms: Sequence[ArmPoint], config: RlConfig) -> str:
    if not arms:
        return ""
    each = [
        f"{arm.label} has a mean |d| of {_say(arm.mean_abs)} nats, a sequence ESS of {_say(arm.ess_seq)} and ends at a "
        f"reward of {_say(arm.reward)} (clean weights {_say(arm.clean_reward)}){_lost(arm)}"
        for arm in arms
    ]
    return f"Without stress, responses of at most {config.max_tokens} tokens: {'; '.join(each)}."


def _stress(what: str, arms: Sequence[ArmPoint]) -> str:
    line = sorted(arms, key=lambda arm: arm.dose)
    each = [
        f"at a dose of {arm.dose:g} ESS {_say(arm.ess_seq)}, reward {_say(arm.reward)} (clean weights "
        f"{_say(arm.clean_reward)}){_lost(arm)}"
        for arm in line
    ]
    return f"Under {what} ({STRESS_NOTE}): {'; '.join(each)}."


def _lost(arm: ArmPoint) -> str:
    ended = [f"{n} {how}" for n, how in ((arm.n_collapsed, "collapsed"), (arm.n_diverged, "diverged")) if n]
    return f", {' and '.join(ended)} of {arm.n_runs}" if ended else ""


def _tests(comparisons: Sequence[ArmComparison], seeds: int) -> list[str]:
    """What was shown, what was not, what could not have been, and what was not tested: each arm in one of them."""
    if not comparisons:
        return []
    if seeds < 2:
        return [
            "Each arm is one run: what separates two arms can be chance, and nothing was tested. "
            f"{MIN_PAIRS} seeds an arm can support a test."
        ]
    found = [c.verdict for c in comparisons if c.reward.differs or c.collapse.differs]
    rest = [c for c in comparisons if not (c.reward.differs or c.collapse.differs)]
    judged = [c for c in rest if c.reward.differs is False and c.reward.detectable is not None]
    if judged:
        largest = number(max(c.reward.detectable or 0.0 for c in judged), 2)
        absent = f"No difference in final reward from its reference was shown for {_names(judged)}"
        found.append(f"{absent}; of true differences below {largest} fewer than 8 of 10 would have been.")
    blind = [c for c in rest if c.reward.differs is False and c.reward.detectable is None]
    if blind:
        found.append(f"For {_names(blind)} no difference could have been shown: {blind[0].reward.why}.")
    untested = [c for c in rest if c.reward.differs is None]
    if untested:
        few = f"{min(c.n_pairs for c in untested)} seeds shared with the reference are too few"
        found.append(f"Final rewards of {_names(untested)} were not tested: {few}, {MIN_PAIRS} can support a test.")
    return found


def _names(comparisons: Sequence[ArmComparison]) -> str:
    return "; ".join(c.first for c in comparisons)


def _place(place: Place, arms: Sequence[ArmPoint]) -> str:
    ess = place.ess_seq.value
    if ess is None:
        return f"{place.label} cannot be placed: {place.ess_seq.why}."
    below = [arm for arm in arms if arm.ess_seq.value is not None and arm.ess_seq.value <= ess]
    nearest = max(below, key=lambda arm: _number(arm.ess_seq)) if below else None
    beside = "below every arm here" if nearest is None else f"next above the arm {nearest.label}"
    return (
        f"{place.label}: a predicted sequence ESS of {_say(place.predicted_ess)}, which a step here would show as "
        f"{_say(place.ess_seq)}, lies {beside}; that another model reacts to it as this one does is not shown."
    )


def _say(value: MetricValue) -> str:
    return number(value.value, 2) if value.value is None or value.value < 0.1 else number(value.value)


def _number(value: MetricValue) -> float:
    return float("nan") if value.value is None else value.value


def notes(arms: Sequence[ArmPoint]) -> list[str]:
    """What limits the page."""
    found = []
    unfinished = [arm.label for arm in arms if not arm.n_runs]
    if unfinished:
        found.append(f"No run has ended of: {', '.join(unfinished)}.")
    lost = sum(arm.n_collapsed + arm.n_diverged for arm in arms)
    if lost:
        share = percent(lost / sum(arm.n_runs for arm in arms))
        found.append(
            f"{share} of the runs collapsed or diverged and ended early; the last steps of a collapsed one count as "
            "final, and a diverged one counts as 0."
        )
    if any(arm.structure != "none" for arm in arms):
        found.append(f"Stress is {STRESS_NOTE}: it shows what a mismatch of that size does, not where it comes from.")
    return found
