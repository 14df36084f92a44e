"""What the runs of a sweep show: a row per run, arms (runs that differ in their seed alone), and what tells them apart.

Where an arm lies on the axes of a dose–response figure is measured in its first steps, while the policy is still near
the initial one: a policy that has collapsed has a large mismatch for that reason, which is not the dose.

No two findings contradict each other. Every comparison of arms is in exactly one of these: a difference was shown, was
not shown, could not have been shown, or was not tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mismatch_probe.config import check_lengths
from mismatch_probe.dtypes import dtype_label
from mismatch_probe.metrics.arms import MIN_PAIRS, Arm, ArmComparison, Run, compare_sweep, mean_over_runs, summarise_arm
from mismatch_probe.metrics.dose import DosedArm, DoseResponse, dose_response
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.report.words import say
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.sweep import ArmResult, Place, SweepSummary
from mismatch_probe.rl.plan import PlannedRun, arm_name, families, labels
from mismatch_probe.rl.records import RlDirectory, SweepDirectory
from mismatch_probe.rl.summary import PHASES, finite_mean
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue

ENDED = ("complete", "collapsed", "diverged")
# Arms got the same dose where the larger ESS is at most so much larger.
SAME_ESS = 0.05
# What tells arms apart, as columns of the table of runs.
AXES = ("rollout_dtype", "trainer_dtype", "trainer_mode", "algorithm", "learning_rate", "stress", "dose", "remedy")
# Columns of the table of steps: what takes the rollout from the trained policy, stale weights included.
DOSES = {"ess_seq": "off_policy_ess_seq", "mean_abs_logprob_diff": "off_policy_mean_abs"}
_MEASURED = (
    *("final_reward", "best_reward", "reward_kept", "clean_reward", "first_above_step"),
    *(name for key in DOSES for name in (key, f"{key}_run")),
)


def summarise_sweep(planned: Sequence[PlannedRun], runs: pd.DataFrame, places: Sequence[Place]) -> SweepSummary:
    """What the runs that have ended show.

    Args:
        planned: All runs.
        runs: See `runs_table`.
        places: Models of comparisons, to be kept beside the arms.
    """
    config, failed = planned[0].config, runs[runs["status"] == "failed"]
    return SweepSummary(
        window=config.pass_window,
        n_sequences=config.prompts_per_step * config.samples_per_prompt,
        max_tokens=config.max_tokens,
        n_planned=len(planned),
        n_ended=int(runs["status"].isin(ENDED).sum()),
        failures=dict(zip(failed["run"].tolist(), failed["why"].tolist(), strict=True)),
        arms=tuple(arm_results(planned, runs)),
        comparisons=tuple(against_reference(planned, runs)),
        dose_response=dose_of(planned, runs),
        places=tuple(places),
    )


def runs_table(sweep: SweepDirectory) -> pd.DataFrame:
    """A row per planned run, ended or not.

    Columns: `run`, `arm`, `AXES`, `seed`, `status` (`complete`, `collapsed`, `diverged`, `failed`, `unfinished`),
    `why`, `steps`; `final_reward`, mean over the last window of the run's configuration; `best_reward`, of its best
    window; `reward_kept`, the ratio of both; `clean_reward`, of the clean weights at the end; `passed` and
    `first_above_step`, the sanity test; `ess_seq` and `mean_abs_logprob_diff`, means over the first window, both also
    with `_run`, over the whole run; seconds by phase. `ess_seq` is what a step's sequences show: of few of them the
    sample ESS is above the policy's.
    """
    table = pd.DataFrame([_row(run, sweep.existing(run), sweep.failure(run)) for run in sweep.runs])
    # A column in which no run has a value is one of numbers all the same.
    return table.astype(dict.fromkeys(_MEASURED, float))


def steps_table(sweep: SweepDirectory) -> pd.DataFrame:
    """The steps of all runs, each with its `run`, `arm` and `seed`."""
    found = []
    for run in sweep.runs:
        folder = sweep.existing(run)
        if folder is not None and len(steps := folder.steps()):
            found.append(steps.assign(run=run.name, arm=run.arm, seed=run.config.seed))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _row(run: PlannedRun, folder: RlDirectory | None, failure: str) -> dict[str, Any]:
    config = run.config
    steps = pd.DataFrame() if folder is None else folder.steps()
    ending = None if folder is None else folder.document.ending
    return {
        "run": run.name,
        "arm": run.arm,
        **{axis: getattr(config, axis) for axis in AXES},
        "seed": config.seed,
        "status": ("failed" if failure else "unfinished") if ending is None else ending.status,
        "why": failure if ending is None else "" if ending.cause is None else say(ending.cause),
        "steps": len(steps),
        **_rewards(steps, config.pass_window),
        "clean_reward": None if ending is None else ending.clean_reward,
        "passed": ending is not None and ending.passed,
        "first_above_step": None if ending is None else ending.first_above_step,
        **_doses(steps, config.pass_window),
        **{f"seconds_{p}": float(steps[f"seconds_{p}"].sum()) if len(steps) else 0.0 for p in PHASES},
    }


def _rewards(steps: pd.DataFrame, window: int) -> dict[str, float | None]:
    if len(steps) < window:
        return {"final_reward": None, "best_reward": None, "reward_kept": None}
    means = steps["reward"].rolling(window).mean().dropna()
    final, best = float(means.iloc[-1]), float(means.max())
    return {"final_reward": final, "best_reward": best, "reward_kept": final / best if best > 0 else None}


def _doses(steps: pd.DataFrame, window: int) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, rows in (("", steps.head(window)), ("_run", steps)):
        found |= {f"{key}{name}": finite_mean(rows, column) for key, column in DOSES.items()}
    return found


def arm_results(planned: Sequence[PlannedRun], runs: pd.DataFrame) -> list[ArmResult]:
    """Arms with means over the seeds of the runs that have ended."""
    firsts = _firsts(planned)
    configs = [run.config for run in firsts]
    found = []
    for run, label, family in zip(firsts, labels(configs), families(configs), strict=True):
        rows = runs[(runs["arm"] == run.arm) & runs["status"].isin(ENDED)]
        config = run.config
        alike = config.rollout_dtype == config.trainer_dtype and config.stress == "none"
        summary = summarise_arm(_arm(label, rows))
        found.append(
            ArmResult(
                arm=run.arm,
                label=label,
                family=family,
                precision=config.rollout_dtype if alike else "",
                structure=config.stress,
                dose=config.dose,
                remedy=config.remedy,
                n_runs=len(rows),
                n_collapsed=int((rows["status"] == "collapsed").sum()),
                n_diverged=int((rows["status"] == "diverged").sum()),
                ess_seq=_mean(rows, "ess_seq"),
                mean_abs_logprob_diff=_mean(rows, "mean_abs_logprob_diff"),
                reward=summary.reward,
                clean_reward=_mean(rows, "clean_reward", lost=0.0),
                reward_kept=_mean(rows, "reward_kept", lost=0.0),
            )
        )
    return found


def _mean(rows: pd.DataFrame, column: str, lost: float | None = None) -> MetricValue:
    """Over runs; `lost` is what those that diverged count as."""
    values = rows[column].to_numpy(float).copy()
    if lost is not None:
        values[(rows["status"] == "diverged").to_numpy()] = lost
    return mean_over_runs(values[np.isfinite(values)])


def _arm(label: str, rows: pd.DataFrame) -> Arm:
    """What a run that diverged, or ended within its first window, gained is no reward."""
    rewards = rows["final_reward"].to_numpy(float)
    runs = []
    for seed, status, reward in zip(rows["seed"].tolist(), rows["status"].tolist(), rewards, strict=True):
        kept = status != "diverged" and bool(np.isfinite(reward))
        if kept or status != "complete":
            runs.append(Run(int(seed), float(reward) if kept else None, status != "complete"))
    return Arm(label, tuple(runs))


def against_reference(planned: Sequence[PlannedRun], runs: pd.DataFrame) -> list[ArmComparison]:
    """Every arm against its reference, of equal algorithm and learning rate: without stress the arm of its precision
    under the remedy `zero-mismatch`, from which it differs in its mismatch alone; else FP32 on both sides without
    stress, or what comes closest to that in the plan's order. References are compared with the first one.
    """
    firsts = _firsts(planned)
    named = dict(zip([run.arm for run in firsts], labels([run.config for run in firsts]), strict=True))
    ended = runs[runs["status"].isin(ENDED)]
    arms = {arm: _arm(label, ended[ended["arm"] == arm]) for arm, label in named.items()}
    head = _reference(firsts)
    pairs = []
    for run in firsts:
        family = [c for c in firsts if _family(c) == _family(run)]
        own = _control(run, family) or _reference(family)
        other = head if own.arm == run.arm else own
        if other.arm != run.arm and arms[run.arm].runs and arms[other.arm].runs:
            pairs.append((arms[run.arm], arms[other.arm]))
    return compare_sweep(pairs)


def dose_of(planned: Sequence[PlannedRun], runs: pd.DataFrame) -> DoseResponse | None:
    """How the final reward follows the measured dose, among the arms that have algorithm and learning rate of the first
    stressed one; None in a sweep without injected stress.
    """
    firsts = _firsts(planned)
    stressed = [run for run in firsts if run.config.stress != "none"]
    if not stressed:
        return None
    measured = runs[runs["status"].isin(ENDED) & runs["ess_seq"].notna() & runs["mean_abs_logprob_diff"].notna()]
    found = []
    for run, label in zip(firsts, labels([run.config for run in firsts]), strict=True):
        if _family(run) != _family(stressed[0]):
            continue
        rows = measured[measured["arm"] == run.arm]
        arm = _arm(label, rows)
        rows = rows.set_index("seed").loc[[run.seed for run in arm.runs]]
        if len(rows):
            structure = "precision" if run.config.stress == "none" else run.config.stress
            # Means of shares can exceed 1 by rounding.
            ess = tuple(min(1.0, float(value)) for value in rows["ess_seq"])
            found.append(DosedArm(arm, structure, ess, tuple(map(float, rows["mean_abs_logprob_diff"]))))
    return dose_response(found, tolerance=SAME_ESS)


def _firsts(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """A run of each arm, in the plan's order."""
    return list({run.arm: run for run in planned}.values())


def _control(run: PlannedRun, planned: Sequence[PlannedRun]) -> PlannedRun | None:
    """The same arm without mismatch, which is none for itself and under stress."""
    wanted = arm_name(run.config.model_copy(update={"remedy": "zero-mismatch"}))
    return next((one for one in planned if one.arm == wanted != run.arm), None)


def _family(run: PlannedRun) -> tuple[str, float]:
    return run.config.algorithm, run.config.learning_rate


def _reference(planned: Sequence[PlannedRun]) -> PlannedRun:
    plain = [c for c in planned if c.config.stress == "none"]
    exact = [c for c in plain if c.config.rollout_dtype == c.config.trainer_dtype == "float32"]
    return (exact or plain or list(planned))[0]


_DRAWS = 4000


def places_of(path: Path, tokens: int, sequences: int) -> list[Place]:
    """A place for every precision that a comparison has on both sides.

    Args:
        path: Run directory of `compare`.
        tokens: Planned response length, at which ESS is predicted.
        sequences: Of a step of the sweep, whose sample ESS the arms show.

    Raises:
        TableError: The folder holds no run, or nothing in it can be compared.
        UsageError: The length cannot be.
    """
    check_lengths((tokens,))
    summary = analyse(RunDirectory.open(path)).report(predict_lengths=(tokens,), extrapolate=True).summary
    model = Path(summary.model).name
    found = []
    for dtype, length in summary.length.items():
        alike = [p for p in summary.pairs if p.rollout_dtype == p.trainer_dtype]
        pairs = [p for p in alike if p.rollout_dtype == dtype]
        if not pairs or not length.predictions:
            continue
        label = f"{model}, {dtype_label(dtype)}, {tokens:,} tokens"
        ess = length.predictions[0].values["ess_seq"]
        found.append(
            Place(
                label=label,
                dtype=pairs[0].rollout_dtype,
                predicted_ess=ess,
                ess_seq=_as_seen(ess, sequences),
                mean_abs_logprob_diff=pairs[0].metrics["mean_abs_logprob_diff"],
            )
        )
    return found


def sample_ess(ess: float, n: int) -> float:
    """What n sequences show on average of a policy's ESS, if log weights are normal.

    The sample ESS (Σw)²/(nΣw²) is at least 1/n and above the policy's, the more so the lower that is.

    Args:
        ess: 1 / E w², in [0, 1].
        n: Sequences.
    """
    variance = -math.log(max(ess, 1e-300))
    draws = np.random.default_rng(0).standard_normal((_DRAWS, n)) * math.sqrt(variance)
    weights = np.exp(draws - draws.max(axis=1, keepdims=True))
    return float((weights.sum(axis=1) ** 2 / (n * (weights**2).sum(axis=1))).mean())


def _as_seen(value: MetricValue, n: int) -> MetricValue:
    seen, low, high = (None if x is None else sample_ess(x, n) for x in (value.value, value.ci_low, value.ci_high))
    return MetricValue(seen, low, high, value.why)


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
