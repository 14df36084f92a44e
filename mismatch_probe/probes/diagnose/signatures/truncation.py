"""One side renormalises over the tokens that truncated sampling keeps, or over rows that are no tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from scipy.special import logsumexp

from mismatch_probe.probes.diagnose.base import Fit, State, complete, noise_of, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Ints, Mask
from mismatch_probe.probes.diagnose.noise import Noise, t_log_density, uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_FLOORS = (0.02, 0.05, 0.11, 0.23, 0.4, 0.7, 1.2, 2.5)
_STEPS = np.linspace(0, 1, 7)
_BINS, _ROUNDS, _LAST_ROUNDS, _FEW = 5, 6, 20, 4_000
_LEAST_SHIFT = 0.004
_DEGREES = (2.0, 4.0, 15.0)


@signature(
    "truncation",
    kind="labels",
    title="One side's log-probs are normalised over fewer tokens than the other's",
    causes=("top-p", "top-k", "min-p", "padded-vocabulary"),
    confirm="Sample a few prompts with top-p, top-k and min-p off, or score with the sampler's support at the trainer.",
    fix=(
        "Sample without truncation, or apply the same truncation to the trainer's logits. vLLM reports the full "
        'distribution with `logprobs_mode="raw_logprobs"`. Slice padded rows off the vocabulary before the softmax.'
    ),
)
def truncation(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """d is noise plus log S of a kept mass S ≤ 1, of one sign at every token: a mixture over shifts of that sign."""
    x = uncertainty(state.expected)
    rest = residual(evidence, state)
    use = np.flatnonzero(train & state.known)
    if len(use) < 50:
        return None
    few = use[:: -(-len(use) // _FEW)]
    edges = np.quantile(x[few], np.linspace(0, 1, _BINS + 1)[1:-1])
    bin_of = np.searchsorted(edges, x)
    table = rest[few], x[few], bin_of[few], state.spread[few]
    start = noise_of(evidence, state, train)
    coarse = (sign * floor for sign in (-1.0, 1.0) for floor in _FLOORS)
    near = _likeliest(table, coarse, (start.degrees,), start, _ROUNDS)
    floors = (near.shifts[-1] * factor for factor in (0.8, 1.0, 1.25))
    mixture = _likeliest(table, floors, _DEGREES, start, _LAST_ROUNDS)
    shift = mixture.expected(rest, x, bin_of, state.spread)
    if np.abs(mixture.mean_shift(bin_of[few])) < _LEAST_SHIFT:
        return None
    found = complete(evidence, state, train, mixture.log_density(rest, x, bin_of, state.spread))
    moved = state.moved(state.expected + np.where(state.known, shift, 0.0))
    side = "rollout" if mixture.shifts[-1] < 0 else "trainer"
    largest = float(np.exp(-np.abs(mixture.shifts[-1])))
    return Fit(found, moved, state.known & (np.abs(shift) > 0.01), {"side": side, "least_kept_mass": largest})


_Table = tuple[Floats, Floats, Ints, Floats]


def _likeliest(table: _Table, floors: Iterable[float], degrees: Iterable[float], noise: Noise, rounds: int) -> _Mixture:
    """The likeliest mixture of those that reach to one of the floors, around which noise has one of the degrees."""
    tried = list(degrees)
    found = [
        _Mixture.fitted(*table, floor * _STEPS, replace(noise, degrees=one), rounds)
        for floor in floors
        for one in tried
    ]
    return max(found, key=lambda mixture: float(mixture.log_density(*table).sum()))


class _Mixture:
    """Shifts with weights that depend on how certain a token is, and noise around each."""

    def __init__(self, shifts: Floats, log_weight: Floats, noise: Noise) -> None:
        self.shifts, self.log_weight, self.noise = shifts, log_weight, noise

    @classmethod
    def fitted(
        cls, rest: Floats, x: Floats, bin_of: Ints, spread: Floats, shifts: Floats, noise: Noise, rounds: int
    ) -> _Mixture:
        log_weight = np.full((_BINS, len(shifts)), -np.log(len(shifts)))
        one = cls(shifts, log_weight, Noise(noise.knots, noise.log_scale - 0.7, noise.degrees, 0.0))
        for _ in range(rounds):
            joint = one._joint(rest, x, bin_of, spread)
            share = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
            weights = np.stack([share[bin_of == k].sum(0) + 0.5 for k in range(_BINS)])
            scale = one.noise.scale(x, spread)
            z = (rest[:, None] - shifts) / scale[:, None]
            tail = (one.noise.degrees + 1) / (one.noise.degrees + z * z)
            change = np.array(
                [
                    0.5
                    * np.log(
                        max(
                            float((share * tail * z * z)[bin_of == k].sum() / max(float((bin_of == k).sum()), 1.0)),
                            1e-12,
                        )
                    )
                    for k in range(_BINS)
                ]
            )
            knots = np.array([np.median(x[bin_of == k]) if (bin_of == k).any() else np.nan for k in range(_BINS)])
            sound = np.isfinite(knots) & (np.diff(knots, prepend=-np.inf) > 0)
            old = np.interp(knots[sound], one.noise.knots, one.noise.log_scale)
            one = cls(
                shifts,
                np.log(weights / weights.sum(1, keepdims=True)),
                Noise(knots[sound], np.maximum(old + change[sound], np.log(1e-7)), noise.degrees, 0.0),
            )
        return one

    def _joint(self, rest: Floats, x: Floats, bin_of: Ints, spread: Floats) -> Floats:
        scale = self.noise.scale(x, spread)
        z = (rest[:, None] - self.shifts) / scale[:, None]
        return np.asarray(t_log_density(z, self.noise.degrees) - np.log(scale)[:, None] + self.log_weight[bin_of])

    def log_density(self, rest: Floats, x: Floats, bin_of: Ints, spread: Floats) -> Floats:
        return np.asarray(logsumexp(self._joint(rest, x, bin_of, spread), axis=1))

    def expected(self, rest: Floats, x: Floats, bin_of: Ints, spread: Floats) -> Floats:
        joint = self._joint(rest, x, bin_of, spread)
        return np.asarray(np.exp(joint - logsumexp(joint, axis=1, keepdims=True)) @ self.shifts)

    def mean_shift(self, bin_of: Ints) -> float:
        return float((np.exp(self.log_weight) @ self.shifts)[bin_of].mean())
