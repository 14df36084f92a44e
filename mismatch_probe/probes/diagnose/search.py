"""Which signatures explain a table: each competes with the others, and what one explains is taken off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, Signature, State, log_density
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask


@dataclass(frozen=True)
class Candidate:
    """A signature beside what is explained so far.

    Attributes:
        signature: Which.
        fit: Fitted to all tokens.
        gain: Gained log-likelihood of prompts that it was not fitted to, nats per token.
        units: The gain in standard errors, over prompts.
        total: The gain of all tokens, nats.
    """

    signature: Signature
    fit: Fit
    gain: float
    units: float
    total: float


def candidates(evidence: Evidence, state: State, known: Mapping[str, Signature]) -> list[Candidate]:
    """Signatures that gain anything, the best first."""
    everything = np.ones(len(evidence), np.bool_)
    plain = log_density(evidence, state, everything).sum()
    before = np.zeros(len(evidence))
    for train in _halves(evidence):
        before[~train] = log_density(evidence, state, train)[~train]
    found = []
    for one in known.values():
        whole = one.fit(evidence, state, everything)
        # What gains nothing where it was fitted gains nothing elsewhere.
        if whole is not None and whole.log_density.sum() > plain:
            found.append(_judged(evidence, state, one, whole, before))
    return sorted((one for one in found if one is not None and one.gain > 0), key=lambda one: -one.gain)


def _halves(evidence: Evidence) -> tuple[Mask, Mask]:
    """`[N]` tokens to fit to, twice: the others judge."""
    return evidence.fold != 0, evidence.fold != 1


def _judged(evidence: Evidence, state: State, one: Signature, whole: Fit, before: Floats) -> Candidate | None:
    after = np.zeros(len(evidence))
    for train in _halves(evidence):
        fit = one.fit(evidence, state, train)
        if fit is None:
            return None
        after[~train] = fit.log_density[~train]
    gains = after - before
    per_prompt = np.bincount(evidence.prompt[evidence.sequence], gains)
    error = float(np.sqrt(((per_prompt - per_prompt.mean()) ** 2).sum()))
    total = float(gains.sum())
    return Candidate(one, whole, total / max(len(evidence), 1), total / max(error, 1e-9), total)
