"""Statements about a sweep, of which no two contradict each other.

The first says which arms differ, the second whether runs without stress stayed healthy. Every comparison is then in
exactly one of these: a difference was shown, was not shown, could not have been shown, or was not tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mismatch_probe.metrics.arms import ArmComparison
from mismatch_probe.metrics.dose import DoseResponse
from mismatch_probe.metrics.seed_tests import MIN_PAIRS
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.sweep import ArmResult, Place, SweepSummary


def sweep_findings(summary: SweepSummary) -> tuple[Finding, ...]:
    """Statements about a sweep, the most important ones first."""
    found = [_difference(summary), _health(summary)]
    if found[0].code in ("sweep-arms-differ", "sweep-no-difference-shown", "sweep-untested"):
        found += _rest(summary.comparisons, untested=found[0].code != "sweep-untested")
    for name, why in summary.failures.items():
        found.append(Finding(code="sweep-run-failed", severity="fail", where=name, values={"why": why}))
    waiting = tuple(arm.label for arm in summary.arms if not arm.n_runs)
    if waiting and summary.n_ended:
        found.append(Finding(code="sweep-arms-unfinished", severity="note", values={"arms": waiting}))
    lost = sum(arm.n_lost for arm in summary.arms)
    if lost:
        values: Mapping[str, Value] = {"n": lost, "total": summary.n_ended}
        found.append(Finding(code="sweep-runs-ended-early", severity="note", values=values))
    if any(arm.structure != "none" for arm in summary.arms):
        found.append(Finding(code="sweep-injected-stress", severity="note"))
    if summary.dose_response is not None and summary.n_ended:
        found += _dose(summary.dose_response)
    return (*found, *(_place(place, summary.arms) for place in summary.places))


def differs(comparison: ArmComparison) -> bool:
    """Whether reward or collapses of two arms differ after the adjustment."""
    return bool(comparison.reward.differs or comparison.collapse.differs)


def _difference(summary: SweepSummary) -> Finding:
    """The one statement on which arms differ."""
    comparisons = summary.comparisons
    most = max((arm.n_runs for arm in summary.arms), default=0)
    seeds: Mapping[str, Value] = {"needed": MIN_PAIRS}
    if not most:
        return Finding(code="sweep-no-run", severity="note", values={"planned": summary.n_planned})
    if not comparisons:
        return Finding(code="sweep-nothing-to-compare", severity="note")
    if most < 2:
        return Finding(code="sweep-one-run-per-arm", severity="note", values=seeds)
    different = [one for one in comparisons if differs(one)]
    if different:
        plain = {arm.label for arm in summary.arms if arm.structure == "none"}
        return _shown(different, len(comparisons), "warn" if {one.first for one in different} & plain else "info")
    if any(one.reward.differs is not None or one.collapse.differs is not None for one in comparisons):
        tested: Mapping[str, Value] = {
            "n_comparisons": len(comparisons),
            "n_reward": sum(one.reward.differs is not None for one in comparisons),
            "n_collapse": sum(one.collapse.differs is not None for one in comparisons),
        }
        return Finding(code="sweep-no-difference-shown", severity="info", values=tested)
    values = {"pairs": min(one.n_pairs for one in comparisons), **seeds}
    return Finding(code="sweep-untested", severity="note", values=values)


def _shown(different: Sequence[ArmComparison], n_comparisons: int, severity: Severity) -> Finding:
    reward = [one for one in different if one.reward.differs]
    values: Mapping[str, Value] = {
        "n_comparisons": n_comparisons,
        "n_different": len(different),
        "differences": {one.first: one.difference for one in reward},
        "references": tuple(one.second for one in reward),
        "p": {one.first: one.reward.p_holm for one in reward if one.reward.p_holm is not None},
        "collapses": tuple(_collapses(one) for one in different if one.collapse.differs),
    }
    return Finding(code="sweep-arms-differ", severity=severity, values=values)


def _collapses(comparison: ArmComparison) -> str:
    (k, other_k), (n, other_n) = comparison.n_collapsed, comparison.n_runs
    return f"{comparison.first} {k} of {n} against {comparison.second} {other_k} of {other_n}"


def _health(summary: SweepSummary) -> Finding:
    """Whether runs without stress collapsed or diverged."""
    plain = [arm for arm in summary.arms if arm.structure == "none" and arm.n_runs]
    total = sum(arm.n_runs for arm in plain)
    if not total:
        return Finding(code="sweep-no-plain-run", severity="note")
    lost = [arm for arm in plain if arm.n_lost]
    if not lost:
        return Finding(code="sweep-runs-healthy", severity="info", values={"total": total})
    values: Mapping[str, Value] = {
        "n": sum(arm.n_lost for arm in lost),
        "total": total,
        "arms": tuple(f"{arm.label} {arm.n_lost} of {arm.n_runs}" for arm in lost),
    }
    return Finding(code="sweep-runs-lost", severity="fail", values=values)


def _rest(comparisons: Sequence[ArmComparison], *, untested: bool) -> list[Finding]:
    """Comparisons of reward that show no difference, each with what limits it."""
    absent: dict[bool, list[ArmComparison]] = {True: [], False: []}
    for one in comparisons:
        if one.reward.differs is False:
            absent[one.reward.detectable is not None].append(one)
    found = []
    if absent[True]:
        values: Mapping[str, Value] = {
            "arms": _names(absent[True]),
            "detectable": max(one.reward.detectable or 0.0 for one in absent[True]),
        }
        found.append(Finding(code="sweep-difference-not-shown", severity="info", values=values))
    if absent[False]:
        values = {"arms": _names(absent[False]), "why": absent[False][0].reward.why}
        found.append(Finding(code="sweep-difference-undetectable", severity="note", values=values))
    few = [one for one in comparisons if one.reward.differs is None]
    if few and untested:
        values = {"arms": _names(few), "pairs": min(one.n_pairs for one in few), "needed": MIN_PAIRS}
        found.append(Finding(code="sweep-few-pairs", severity="note", values=values))
    return found


def _names(comparisons: Sequence[ArmComparison]) -> tuple[str, ...]:
    return tuple(one.first for one in comparisons)


def _dose(response: DoseResponse) -> list[Finding]:
    """Which dose decides, and whether ESS alone does."""
    ess, gap = (link.left_over.value for link in response.links)
    if ess is None or gap is None or response.difference.ci_low is None:
        first = Finding(code="dose-inconclusive", severity="note", values={"why": response.difference.why})
    else:
        values: Mapping[str, Value] = {
            "ess_left": ess,
            "gap_left": gap,
            "difference": response.difference,
            "n_arms": response.n_arms,
            "n_seeds": response.n_seeds,
            "better": response.better,
        }
        code = "dose-not-told-apart" if response.better is None else "dose-better"
        first = Finding(code=code, severity="info", values=values)
    pairs: Mapping[str, Value] = {
        "n_pairs": len(response.matched),
        "n_tested": len(response.tested),
        "n_different": sum(bool(pair.comparison.reward.differs) for pair in response.tested),
        "n_against": sum(pair.against_the_dose for pair in response.matched),
        "detectable": response.detectable,
    }
    severity: Severity = "info" if response.ess_alone in ("refuted", "no-difference") else "note"
    return [first, Finding(code=f"ess-alone-{response.ess_alone}", severity=severity, values=pairs)]


def _place(place: Place, arms: Sequence[ArmResult]) -> Finding:
    """Where a model lies among the arms that have a measured ESS."""
    ess = place.ess_seq.value
    if ess is None:
        return Finding(code="place-unknown", severity="note", where=place.label, values={"why": place.ess_seq.why})
    known = {arm.label: arm.ess_seq.value for arm in arms if arm.n_runs and arm.ess_seq.value is not None}
    below = [label for label, value in known.items() if value <= ess]
    values: Mapping[str, Value] = {
        "predicted": place.predicted_ess,
        "seen": place.ess_seq,
        "neighbour": max(below, key=lambda label: known[label]) if below else None,
    }
    return Finding(code="place-among-arms", severity="info", where=place.label, values=values)
