"""The chosen log-prob is divided by a temperature after the softmax."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mismatch_probe.probes.diagnose.base import (
    Fit,
    State,
    Variant,
    best_of,
    likeliest,
    log_density,
    mean_gap,
    normalised,
    robust_fit,
)
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature
from mismatch_probe.probes.diagnose.signatures.temperature import rests
from mismatch_probe.probes.diagnose.temper import log_power_sum

_FACTORS = tuple(float(f) for f in np.exp(np.concatenate([-np.geomspace(0.02, 1.3, 22), np.geomspace(0.02, 1.3, 22)])))
_TEMPERATURES = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.94, 1.06, 1.11, 1.18, 1.25, 1.33, 1.5, 1.7, 2.0)
_SMALL, _MOST_LEFT = 1e-6, 0.4


@signature(
    "scaled-logprobs",
    kind="labels",
    title="One side's log-probs are the other's times a constant",
    causes=("divided-after-softmax",),
    confirm="Multiply one side by the fitted factor: what is left is rounding.",
    fix="Divide logits by the temperature before the softmax, not the log-prob after it.",
)
def scaled_logprobs(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """a = c·b at every token, or a is that of the temperature by which b, or a, was divided after the softmax."""
    if normalised(evidence, state):
        return None
    fit = likeliest([_scaled(evidence, state, train), best_of(evidence, _tempered(evidence, state), train)], train)
    if fit is None or mean_gap(evidence, fit.state, train) > _MOST_LEFT * mean_gap(evidence, state, train):
        return None
    return fit


def _tempered(evidence: Evidence, state: State) -> Iterator[Variant]:
    """Sampled at T by one side's softmax; the other divides the chosen log-prob, so that its numbers sum to no 1."""
    everywhere = np.ones(len(evidence), np.bool_)
    b = state.expected
    for rest in rests(evidence, state):
        for t in _TEMPERATURES:
            yield Variant(
                state.moved(b - log_power_sum(b * t, 1 / t, rest)), everywhere, {"side": "rollout", "temperature": t}
            )
            yield Variant(
                state.moved(b - log_power_sum(b, t, rest) / t), everywhere, {"side": "trainer", "temperature": t}
            )


def _scaled(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    everywhere = np.ones(len(evidence), np.bool_)
    forms = (Variant(state.moved(c * state.expected), everywhere, {"factor": c}) for c in _FACTORS)
    near = best_of(evidence, forms, train)
    if near is None:
        return None
    uncertain = np.abs(state.expected) > _SMALL
    rest = robust_fit(evidence, near.state, train & uncertain, state.expected[None, :])
    ratio = (near.state.expected + rest)[uncertain] / state.expected[uncertain]
    factor = float(np.median(ratio)) if len(ratio) else 1.0
    moved = near.state.moved(factor * state.expected)
    polished = Fit(log_density(evidence, moved, train), moved, everywhere, {"factor": factor})
    return likeliest([near, polished], train)
