"""Which signatures explain a table: each competes with the others, and what one explains is taken off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    before = _held_out(evidence, lambda train: log_density(evidence, state, train))
    found = []
    for one in known.values():
        candidate = _candidate(evidence, state, one, before)
        if candidate is not None:
            found.append(candidate)
    return sorted(found, key=lambda one: -one.gain)


def _candidate(evidence: Evidence, state: State, one: Signature, before: Floats) -> Candidate | None:
    whole = one.fit(evidence, state, np.ones(len(evidence), np.bool_))
    if whole is None:
        return None
    after = np.zeros(len(evidence))
    for fold in (0, 1):
        train = evidence.fold != fold
        fit = one.fit(evidence, state, train)
        if fit is None:
            return None
        after[~train] = fit.log_density[~train]
    gains = after - before
    per_prompt = np.bincount(evidence.prompt[evidence.sequence], gains)
    n = max(len(evidence), 1)
    error = float(np.sqrt((per_prompt**2).sum() - per_prompt.sum() ** 2 / max(len(per_prompt), 1)))
    total = float(gains.sum())
    return Candidate(one, whole, total / n, total / max(error, 1e-9), total)


def _held_out(evidence: Evidence, density: Callable[[Mask], Floats]) -> Floats:
    found = np.zeros(len(evidence))
    for fold in (0, 1):
        train = evidence.fold != fold
        found[~train] = density(train)[~train]
    return found
