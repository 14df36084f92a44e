"""One side samples with a penalty on tokens that the context already has."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import (
    Fit,
    State,
    complete,
    likeliest,
    log_density,
    normalised,
    robust_fit,
    two_sided,
)
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.noise import uncertainty
from mismatch_probe.probes.diagnose.one_sided import one_sided
from mismatch_probe.probes.diagnose.signatures import signature

_LEAST = _SHOWN = 0.01  # nats
_LEAST_MEAN = 0.002


@signature(
    "penalty",
    kind="labels",
    title="One side penalises tokens that stand earlier in the context, the other does not",
    causes=("repetition-penalty", "presence-penalty", "frequency-penalty"),
    confirm="Sample a few prompts with repetition, presence and frequency penalties off.",
    fix=(
        "Set `repetition_penalty=1`, `presence_penalty=0`, `frequency_penalty=0` in the sampling parameters: "
        "vLLM fills what they leave out from the "
        'model\'s generation_config.json (`generation_config="vllm"` switches that off).'
    ),
)
def penalty(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """d is of one sign on tokens seen before and of the other on new ones, or follows how often a token was there."""
    seen = evidence.seen
    use = train & state.known
    if min(int((use & seen).sum()), int((use & ~seen).sum())) < 50 or not normalised(evidence, state):
        return None
    return likeliest([_present(evidence, state, train), _counted(evidence, state, train)], train)


def _present(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """Logits of seen tokens were lower by a constant at one side: by how much less the log-prob is depends on how much
    of the other tokens is seen.
    """
    q: Floats = np.exp(uncertainty(state.expected))
    p = 1 - q
    up = np.where(evidence.seen, 1.0, -1.0)

    def largest(penalty: float) -> Floats:
        """Where the other tokens are all of the other kind."""
        return np.asarray(up * penalty - np.log(p * np.exp(up * penalty) + q))

    fit = one_sided(
        evidence, state, train, (largest, lambda penalty: largest(-penalty)), evidence.seen.astype(np.int64)
    )
    if fit is None or fit.mean < _LEAST_MEAN:
        return None
    found = complete(evidence, state, train, fit.log_density)
    return _told(evidence, state, train, fit.shift, found)


def _counted(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """A smooth course over 1 − p for tokens seen, new, and by how often they were there."""
    q = np.exp(uncertainty(state.expected))
    seen = evidence.seen
    # By how much oftener than the tokens so far: what a penalty per occurrence takes off, less what it gives to all.
    often = evidence.again - np.bincount(evidence.sequence, evidence.again)[evidence.sequence] / np.maximum(
        np.bincount(evidence.sequence)[evidence.sequence], 1
    )
    weights = (seen, ~seen, evidence.again > 0, often)
    shift = robust_fit(evidence, state, train, np.stack([weight * one for one in (q, q * q) for weight in weights]))
    return _told(evidence, state, train, shift, None)


def _told(evidence: Evidence, state: State, train: Mask, shift: Floats, density: Floats | None) -> Fit | None:
    use = train & state.known
    on_seen, on_new = (float(np.mean(shift[use & some])) for some in (evidence.seen, ~evidence.seen))
    if abs(on_seen - on_new) < _LEAST or not two_sided(shift[use]):
        return None
    moved = state.moved(state.expected + np.where(state.known, shift, 0.0))
    told = {"side": "rollout" if on_seen > on_new else "trainer", "mean_d_seen": on_seen, "mean_d_new": on_new}
    found = log_density(evidence, moved, train) if density is None else density
    return Fit(found, moved, state.known & (np.abs(shift) > _SHOWN), told)
