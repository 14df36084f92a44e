"""One side's logits divided by a temperature, or its log-probs after the softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mismatch_probe.metrics.hypotheses import INVERSE_TEMPERATURES
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import SIDES, Hypothesis, Named, Subject
from mismatch_probe.results.diagnosis import Side

_GRID = tuple(1 / beta for beta in INVERSE_TEMPERATURES)[::-1]
_TELLING = 3.0  # nats of log-likelihood, of all ids, that tell two temperatures of sampling apart
_FIX = (
    "Make both sides compute log-probs at the temperature of sampling: vLLM with logprobs_mode=processed_logprobs, the "
    "trainer with logits divided by it."
)
_RAW = Named(
    "rollout-raw-temperature",
    "The rollout samples at a temperature and records log-probs at temperature 1",
    _FIX,
    "rollout",
)
_TRAINER = Named(
    "trainer-temperature", "The trainer divides logits by a temperature that nobody sampled with", _FIX, "trainer"
)
_ROUND, _NEAR_ROUND = 0.05, 0.004  # temperatures that people set are multiples; and how well one is fitted
_MISSED = Named(
    "trainer-temperature", "The trainer computes log-probs at another temperature than sampling", _FIX, "trainer"
)
_ROLLOUT = Named("scaled-head", "The rollout's logits are scaled, and its ids sampled so", _FIX, "rollout")
_DIVIDED = Named(
    "divided-after-softmax",
    "Log-probs are divided by a temperature after the softmax",
    "Divide logits before the softmax.",
)


@experiment("temperature", classes=("temperature",), forwards=0)
def run(subject: Subject) -> Iterator[Hypothesis]:
    """Fits the temperature of each side's column; the ids themselves say at which one they were sampled."""
    for side in SIDES:
        fit = subject.fit(side, subject.rows.at, _GRID, 1e-4)
        if fit is not None:
            found = {"temperature": fit[0], "sampled_at": subject.sampled_at}
            cause = _cause(subject, side, fit[0])
            yield Hypothesis(f"{side} at another temperature", cause, fit[1], found, only=side)


def _cause(subject: Subject, side: Side, temperature: float) -> Named:
    """Who is wrong: the ids were sampled at the one temperature or at the other, by their likelihoods."""
    gain = float((subject.rows.at(temperature) - subject.plain).sum())
    likelier, other = (_RAW, _TRAINER) if side == "trainer" else (_MISSED, _ROLLOUT)
    named, rival = (likelier, other) if gain > 0 else (other, likelier)
    if named is _MISSED:  # a scaled head gives the same columns as a temperature that the trainer lacks
        meant = abs(temperature - _ROUND * round(temperature / _ROUND)) < _NEAR_ROUND
        return replace(_MISSED, also=(_ROLLOUT.name,)) if meant else replace(_ROLLOUT, also=(_MISSED.name,))
    return named if abs(gain) > _TELLING else replace(named, also=(rival.name,))


@experiment("divided-after-softmax", classes=("scaled-logprobs",), forwards=0)
def divided(subject: Subject) -> Iterator[Hypothesis]:
    """Fits the number that log-probs were divided by."""
    for side in SIDES:
        fit = subject.fit(side, lambda by: subject.plain / by, _GRID, 1e-4)
        if fit is not None:
            yield Hypothesis(f"{side} divided after the softmax", _DIVIDED, fit[1], {"by": fit[0]}, only=side)
