"""The log-prob of the likeliest token is recorded in place of the sampled one's."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, complete, noise_of, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.noise import Noise, t_log_density, uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_ROUNDS = 10
# A token misses the likeliest one with probability 1 − e^b; of those misses so many are to be seen.
_OF_EXPECTED = 0.5
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
    rest, x = residual(evidence, state), uncertainty(state.expected)
    p = np.exp(np.clip(state.expected, -30.0, -1e-6))
    use = train & state.known
    if use.sum() < 50:
        return None
    missed = rest < -0.3
    mean = float(np.mean(-rest[use & missed])) if (use & missed).any() else 1.0
    weight = np.ones(len(evidence))
    noise = noise_of(evidence, state, train)
    for _ in range(_ROUNDS):
        near, far = _parts(rest, x, state, noise, p, mean)
        weight = 1 / (1 + np.exp(np.clip(far - near, -50, 50)))
        noise = noise_of(evidence, state, train, weight)
        off = use & (rest < 0)
        mean = float(((1 - weight) * -rest)[off].sum() / max(float((1 - weight)[off].sum()), 1e-9))
        mean = max(mean, 0.1)
    near, far = _parts(rest, x, state, noise, p, mean)
    found = complete(evidence, state, train, np.logaddexp(near, far))
    shown = state.known & (far > near)
    expected_misses = float(np.mean(1 - p[use]))
    if float(shown[use].mean()) < _OF_EXPECTED * expected_misses:
        return None
    return Fit(found, state.without(shown), shown, {"share_not_likeliest": float(shown[use].mean())})


def _parts(rest: Floats, x: Floats, state: State, noise: Noise, p: Floats, mean: float) -> tuple[Floats, Floats]:
    scale = noise.scale(x, state.spread)
    near = np.log(p) + t_log_density(rest / scale, noise.degrees) - np.log(scale)
    # Beside the likeliest token no other has more than what that one leaves.
    beyond = rest - np.minimum(np.log1p(-p) - np.log(p) + _SLACK, 0.0)
    below = np.where(beyond < 0, beyond / mean - np.log(mean), -60.0)
    return near, np.log1p(-p) + below
