"""Words of `rl gradient`."""

from __future__ import annotations

import math

from mismatch_probe.report.format import clipped, number
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

_COSINES = {
    "cosine": "by rollout dtype: cosine of the estimate without weights with the reference",
    "negligible": "1 − cosine² below which an estimate agrees with the reference",
}


@words(
    "gradient-turned",
    "1 − cosine² with the reference exceeds 1 % by the interval: the mismatch turns the uncorrected gradient.",
    _COSINES,
    "Train with a correction, or make the gap smaller: `mismatch-probe attribute` says where it comes from.",
)
def _turned(finding: Finding) -> str:
    return f"The mismatch turns the uncorrected gradient away from the reference: {_angles(finding)}."


@words(
    "gradient-undecided",
    "The interval leaves open whether 1 − cosine² with the reference exceeds 1 %.",
    _COSINES,
    "Measure with more prompts.",
)
def _undecided(finding: Finding) -> str:
    return f"The data do not decide whether the mismatch turns the uncorrected gradient: {_angles(finding)}."


@words(
    "gradient-agrees",
    "1 − cosine² of the uncorrected gradient with the reference is at most 1 % by the interval (an angle of 5.7°).",
    _COSINES,
)
def _agrees(finding: Finding) -> str:
    return f"The uncorrected gradient agrees with the reference: {_angles(finding)}."


def _angles(finding: Finding) -> str:
    return ", ".join(f"{_angle(value)} for {dtype} rollouts" for dtype, value in finding.metrics("cosine").items())


def _angle(cosine: MetricValue) -> str:
    """A cosine with its interval as an angle, e.g. `12° [2.9°, 134°]`."""
    if cosine.value is None:
        return f"no value ({cosine.why})"
    text = _degrees(cosine.value)
    if cosine.ci_low is None or cosine.ci_high is None:
        return text
    return f"{text} [{_degrees(cosine.ci_high)}, {_degrees(cosine.ci_low)}]"


def _degrees(cosine: float) -> str:
    return f"{number(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))), 2)}°"


@words(
    "gradient-closest-correction",
    "Of the corrections that training in the rollout's own dtype can have, these come closest to the reference, and "
    "closer than none by the intervals.",
    {
        "dtype": "dtype of the rollouts",
        "corrections": "the corrections, more than one where their weights are the same here",
        "algorithm": "the algorithm of `rl run` that applies the first of them and nothing else",
        "cosine": "cosine with the reference",
        "effective_batch": "fraction of an unweighted batch with the same ratio of signal to noise",
    },
    "Train with it.",
)
def _closest(finding: Finding) -> str:
    names, batch = ", ".join(finding.names("corrections")), finding.metric("effective_batch")
    same = " (same weights here)" if len(finding.names("corrections")) > 1 else ""
    angle = _angle(finding.metric("cosine"))
    return (
        f"{finding.text('dtype')} rollouts: {names}{same} comes closest to the reference, {angle}, "
        f"at an effective batch of {in_line(batch)}."
    )


@words(
    "gradient-no-closer",
    "By the intervals, no correction that training in the rollout's own dtype can have comes closer than none.",
    {
        "dtype": "dtype of the rollouts",
        "corrections": "those with the best estimate, more than one where their weights are the same here",
        "cosine": "their cosine with the reference",
    },
    "Make the gap smaller: `mismatch-probe attribute` says where it comes from.",
)
def _no_closer(finding: Finding) -> str:
    best = f"{', '.join(finding.names('corrections'))}: " if finding.names("corrections") else ""
    return (
        f"No correction is shown to come closer to the reference for {finding.text('dtype')} rollouts (best: {best}"
        f"{_angle(finding.metric('cosine'))}). See where the gap comes from."
    )


@words(
    "gradient-sequences-left-out",
    "Sequences that are empty, or have log-probs that are not finite or impossible, are left out.",
    {
        "dtype": "dtype of the rollouts",
        "kept": "sequences that count",
        "empty": "sequences without a token",
        "nonfinite": "sequences with a log-prob that is not finite",
        "impossible": "others with a log-prob that is impossible",
    },
    "Sequences without tokens are harmless. For the others, the comparison's own report names the engine.",
)
def _left_out(finding: Finding) -> str:
    kinds = {"empty": "empty", "nonfinite": "not finite", "impossible": "with impossible log-probs"}
    parts = [f"{finding.number(key):,.0f} {what}" for key, what in kinds.items() if finding.number(key)]
    return (
        f"{finding.text('dtype')} rollouts: {', '.join(parts)} left out; {finding.number('kept'):,.0f} sequences count."
    )


@words(
    "gradient-pass-missing",
    "A rollout pass is left out.",
    {"why": "the reason"},
    "Fix the reason and continue the comparison.",
)
def _missing(finding: Finding) -> str:
    return f"{finding.where} is left out: {finding.text('why').rstrip('.')}."


@words(
    "gradient-limited",
    "A reason limits numbers of these dtypes.",
    {"why": "the reason", "dtypes": "dtypes of the rollouts"},
    "Measure with more prompts where the interval is uncalibrated.",
)
def _limited(finding: Finding) -> str:
    return f"{', '.join(finding.names('dtypes'))}: {clipped(finding.text('why'), 200)}."
