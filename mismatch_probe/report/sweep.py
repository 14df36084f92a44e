"""The report of a sweep of RL runs."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mismatch_probe.report.data import STRESS_NOTE
from mismatch_probe.report.format import NONE, count, number
from mismatch_probe.report.model import (
    STATES,
    Cell,
    Column,
    FigureRef,
    Items,
    Report,
    Section,
    Step,
    Table,
    Text,
    Tone,
    columns,
    estimate,
    numeric,
    plain,
    section,
    table,
)
from mismatch_probe.report.rl_run import provenance_table, settings_section
from mismatch_probe.report.words import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mismatch_probe.metrics.arms import ArmComparison, ArmTest
    from mismatch_probe.metrics.dose import DoseResponse
    from mismatch_probe.report.data import SweepData
    from mismatch_probe.results.finding import Finding
    from mismatch_probe.results.sweep import ArmResult, Place, SweepSummary

_TONES: dict[str, Tone] = {"info": "plain", "note": "note", "warn": "warn", "fail": "fail"}
_FEW_SEEDS = frozenset({"sweep-one-run-per-arm", "sweep-untested"})
_SEEDS = 8


def sweep_report(data: SweepData) -> Report:
    """Which arms of a sweep differ by more than noise, and what each of them did."""
    difference, health, *rest = data.sweep.findings
    summary = data.summary
    failed = any(found.severity == "fail" for found in data.sweep.findings)
    dose = [found for found in rest if found.code.startswith(("dose-", "ess-alone-"))]
    places = [found for found in rest if found.code.startswith("place-")]
    return Report(
        title=f"RL sweep of {data.model}, task {data.task}",
        state="fail" if failed else STATES[difference.severity],
        answer=(say(difference), say(health)) if summary.n_ended else (say(difference),),
        steps=_next(data, difference),
        table=_arms(summary),
        notes=tuple(_note(found) for found in rest if found not in dose and found not in places),
        sections=(
            *section("dose", "Reward against the measured mismatch", FigureRef("dose")),
            *section("curves", "Training, arm by arm", FigureRef("curves")),
            *_comparisons(summary.comparisons),
            *_dose(summary.dose_response, dose),
            *_places(summary.places, places),
            *_runs(data),
            *_settings(data),
            *section("provenance", "Provenance", provenance_table(data.sweep.provenance), depth="detail"),
        ),
    )


def _note(found: Finding) -> Text:
    return Text(say(found), _TONES[found.severity])


def _next(data: SweepData, difference: Finding) -> tuple[Step, ...]:
    folder, summary = shlex.quote(data.folder), data.summary
    found = []
    if summary.n_ended < summary.n_planned:
        left = summary.n_planned - summary.n_ended
        text = f"Continue the sweep: {count(left)} {'run has' if left == 1 else 'runs have'} not ended."
        found.append(Step(text, f"mismatch-probe rl sweep --resume {folder}"))
    lost = data.runs[data.runs["status"].isin(["collapsed", "diverged"]) & (data.runs["stress"] == "none")]
    if len(lost):
        run = shlex.quote(f"{data.folder}/runs/{lost['run'].iloc[0]}")
        found.append(Step("See why a run without stress was lost.", f"mismatch-probe rl report {run}"))
    if difference.code in _FEW_SEEDS:
        command = f"mismatch-probe rl sweep {folder} --seeds {_SEEDS}"
        found.append(Step("Run the same arms with enough seeds for a test.", command))
    mismatches = {(arm.precision, arm.structure, arm.dose, arm.remedy) for arm in summary.arms}
    if len(mismatches) > 1 and not summary.places and summary.n_ended:
        command = f"mismatch-probe rl report {folder} --place COMPARISON"
        found.append(Step("Place your own model among the arms; COMPARISON is a folder of `compare`.", command))
    return tuple(found)


def _arms(summary: SweepSummary) -> Table:
    header = (
        Column("arm"),
        Column("runs", numeric=True, rank=3),
        Column("ESS", numeric=True),
        Column("mean |Δ log-prob|, nats", numeric=True, rank=1),
        Column("final reward", numeric=True),
        Column("clean reward", numeric=True, rank=2),
        Column("kept", numeric=True, rank=4),
        Column("lost", numeric=True),
    )
    legend = (
        f"Means over seeds with 95 % intervals. ESS over n and mean |Δ log-prob|: first {summary.window} steps; ESS as "
        f"the {summary.n_sequences} sequences of a step show it, responses of at most {summary.max_tokens} tokens. "
        f"Final reward: last {summary.window} steps of the sampled policy. Clean reward: final weights in FP32 without "
        "stress. Kept: final over best reward. Lost: runs that collapsed or diverged."
    )
    return Table(header, tuple(_arm(arm) for arm in summary.arms), legend)


def _arm(arm: ArmResult) -> tuple[Cell, ...]:
    values = (arm.ess_seq, arm.mean_abs_logprob_diff, arm.reward, arm.clean_reward, arm.reward_kept)
    name = Cell(arm.label, below=STRESS_NOTE if arm.structure != "none" else "")
    lost = Cell(f"{arm.n_lost} of {arm.n_runs}", tone="fail" if arm.n_lost and arm.structure == "none" else "plain")
    return (name, plain(arm.n_runs), *(estimate(value) for value in values), lost)


def _comparisons(comparisons: Sequence[ArmComparison]) -> tuple[Section, ...]:
    rows = [
        (
            Cell(f"{one.first} against {one.second}"),
            plain(one.n_pairs),
            estimate(one.difference),
            _p(one.reward),
            plain(one.reward.detectable, digits=2),
            Cell(" / ".join(f"{k} of {n}" for k, n in zip(one.n_collapsed, one.n_runs, strict=True))),
            _p(one.collapse),
        )
        for one in comparisons
    ]
    header = columns(
        "arms",
        *numeric("pairs", "difference of final reward", "p of reward", "detectable", "collapses", "p of collapses"),
    )
    text = Text(
        "Final rewards are paired by seed (sign-flip test, at least 8 pairs), collapses are counted (Fisher). p is "
        "adjusted over the rows (Holm). Detectable: the smallest true difference that 8 of 10 such sweeps would show. "
        "The interval is Student's over seeds, not adjusted: where differences are far from normal it can disagree "
        "with the test."
    )
    return section("comparisons", "Against the reference arm", text, table(header, rows))


def _p(test: ArmTest) -> Cell:
    """The adjusted p-value, with what limits the test."""
    return Cell(NONE if test.p_holm is None else f"{test.p_holm:.2g}", below=test.why)


def _dose(response: DoseResponse | None, found: Sequence[Finding]) -> tuple[Section, ...]:
    if response is None:
        return ()
    links = [
        (Cell(name), estimate(link.reward), estimate(link.collapse), estimate(link.left_over))
        for name, link in zip(("ESS", "mean |Δ log-prob|"), response.links, strict=True)
    ]
    matched = [
        (
            Cell(f"{pair.comparison.first} against {pair.comparison.second}"),
            Cell(" / ".join(number(value) for value in pair.ess_seq)),
            Cell(" / ".join(number(value) for value in pair.mean_abs_logprob_diff)),
            estimate(pair.comparison.difference),
            _p(pair.comparison.reward),
        )
        for pair in response.matched
    ]
    return section(
        "dose-response",
        "Dose response",
        Items(tuple(Text(say(one)) for one in found)),
        table(
            ["measure", *numeric("rank correlation, reward", "rank correlation, collapse", "variance left")],
            links,
            "Correlations over arms, of means over the seeds that all arms have. Variance left: part of the variance "
            "of final reward between arms around the best monotone curve of the measure.",
        ),
        FigureRef("equal_ess"),
        table(["arms of equal ESS", *numeric("ESS", "mean |Δ log-prob|", "difference of final reward", "p")], matched)
        if matched
        else None,
    )


def _places(places: Sequence[Place], found: Sequence[Finding]) -> tuple[Section, ...]:
    rows = [
        (Cell(p.label), estimate(p.predicted_ess), estimate(p.ess_seq), estimate(p.mean_abs_logprob_diff))
        for p in places
    ]
    header = columns("model", *numeric("predicted ESS", "ESS of a step's sequences", "mean |Δ log-prob|, nats"))
    shown = table(header, rows)
    return section("places", "Placed models", Items(tuple(Text(say(one)) for one in found)), shown)


def _runs(data: SweepData) -> tuple[Section, ...]:
    rows = [
        (Cell(name), Cell(status, below=why), plain(int(steps)), _number(reward))
        for name, status, why, steps, reward in zip(
            *(data.runs[column].tolist() for column in ("run", "status", "why", "steps", "final_reward")), strict=True
        )
    ]
    header = columns("run", "status", *numeric("steps", "final reward"))
    return section("runs", "Runs", table(header, rows), depth="detail")


def _number(value: float) -> Cell:
    return plain(None if value != value else float(value))  # NaN where there is none


def _settings(data: SweepData) -> tuple[Section, ...]:
    configs = [run.config for run in data.sweep.runs]
    shared = {name: value for name, value in configs[0].items() if all(one.get(name) == value for one in configs)}
    return settings_section("Settings of all runs", shared)
