"""The log-prob of the likeliest token is recorded in place of the sampled one's."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, complete, likeliest, noise_of, per_sequence, quiet, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.noise import Noise, t_log_density, uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_ROUNDS = 10
# A token misses the likeliest one with probability 1 − e^b; of those misses so many are to be seen.
_OF_EXPECTED, _QUIET, _LEAST = 0.5, 4.0, 50
_SLACK = 0.1  # nats, for rounding


@signature(
    "top1-logprobs",
    kind="labels",
    title="One side's log-prob is that of the likeliest token, not of the sampled one",
    causes=("top1-instead-of-sampled",),
    confirm="Look at tokens with a large gap: the other side gives the sampled token a low rank.",
    fix="Take the entry of the sampled id from the engine's list of log-probs, not the first entry.",
)
def top1_logprobs(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """With probability e^b the sampled token is the likeliest and d is noise, else a is of the 1 − e^b that is left."""
    everywhere = np.ones(len(evidence), np.bool_)
    fit, gain = _fitted(evidence, state, train, everywhere)
    some, _ = _fitted(evidence, state, train, evidence.of_sequence(gain > 0))
    return likeliest([fit, some], train)


def _fitted(evidence: Evidence, state: State, train: Mask, affected: Mask) -> tuple[Fit | None, Floats]:
    """The fit where rows of some tokens `[N]` are affected, or may be, and what each row `[S]` gains by being so."""
    rest, x = residual(evidence, state), uncertainty(state.expected)
    p = np.exp(np.clip(state.expected, -30.0, -1e-6))
    use = train & state.known & affected
    if use.sum() < _LEAST:
        return None, np.zeros(len(evidence.prompt))
    missed = use & (rest < -0.3)
    mean = float(np.mean(-rest[missed])) if missed.any() else 1.0
    noise = noise_of(evidence, state, train)
    for _ in range(_ROUNDS):
        near, far = _parts(rest, x, state, noise, p, mean)
        missing = np.where(affected, 1 / (1 + np.exp(np.clip(near - far, -50, 50))), 0.0)
        noise = noise_of(evidence, state, train, 1 - missing)
        off = use & (rest < 0)
        mean = max(float((missing * -rest)[off].sum() / max(float(missing[off].sum()), 1e-9)), 0.1)
    near, far = _parts(rest, x, state, noise, p, mean)
    plain, found = noise.log_density(rest, x, state.spread), np.logaddexp(near, far)
    gain = per_sequence(evidence, state, found - plain)
    if not affected.all():
        # Each row is as this says or as rounding is.
        length = np.maximum(per_sequence(evidence, state, np.ones(len(evidence))), 1)
        found = plain + evidence.of_sequence((np.logaddexp(0.0, gain) - np.log(2)) / length)
    shown = state.known & affected & (far > near)
    enough = float(shown[use].mean()) >= _OF_EXPECTED * float(np.mean(1 - p[use]))
    if not enough or not quiet(evidence, state, ~shown, _QUIET):
        return None, gain
    found = complete(evidence, state, train, found)
    told = {"share_not_likeliest": float(shown[use].mean()), "share_of_tokens": float(affected.mean())}
    return Fit(found, state.without(shown), shown, told), gain


def _parts(rest: Floats, x: Floats, state: State, noise: Noise, p: Floats, mean: float) -> tuple[Floats, Floats]:
    scale = noise.scale(x, state.spread)
    near = np.log(p) + t_log_density(rest / scale, noise.degrees) - np.log(scale)
    # Beside the likeliest token no other has more than what that one leaves.
    beyond = rest - np.minimum(np.log1p(-p) - np.log(p) + _SLACK, 0.0)
    below = np.where(beyond < 0, beyond / mean - np.log(mean), -60.0)
    return near, np.log1p(-p) + below
