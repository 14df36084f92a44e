"""Words of `rl sanity-set`."""

from __future__ import annotations

from mismatch_probe.report.format import percent
from mismatch_probe.report.model import in_line
from mismatch_probe.report.words import words
from mismatch_probe.results.finding import Finding

_COUNTS = {
    "kept": "problems kept",
    "tried": "problems tried",
    "low": "lower bound of the accuracy, a fraction",
    "high": "upper bound",
    "n_samples": "responses to each problem",
}


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
