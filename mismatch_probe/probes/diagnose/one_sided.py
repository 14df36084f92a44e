"""Shifts of any size up to a largest one that is known: what normalising over other tokens makes of log-probs.

Shape legend: `N` tokens, `n` those that are fitted to, `J` shares of the largest shift, `K` bins of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mismatch_probe.probes.diagnose.base import State, noise_of, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Ints, Mask
from mismatch_probe.probes.diagnose.noise import FLOOR, Noise, t_log_density, uncertainty

_STRENGTHS = (0.02, 0.05, 0.11, 0.23, 0.4, 0.7, 1.2, 2.5)
_FINER = (0.8, 1.0, 1.25)
_STEPS = np.array([0.0, 0.005, 0.02, 0.07, 0.16, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
_DEGREES = (2.0, 4.0, 15.0)
_BINS, _ROUNDS, _LAST_ROUNDS, _MOST_FIRST, _MOST, _LEAST = 5, 4, 10, 1_000, 2_500, 50


@dataclass(frozen=True)
class OneSided:
    """What was fitted.

    Attributes:
        which: Index of the form that fits.
        log_density: `[N]` of what is not explained yet.
        shift: `[N]` of each token, as its residual suggests, nats.
        mean: Size of a shift, nats.
    """

    which: int
    log_density: Floats
    shift: Floats
    mean: float


Form = Callable[[float], Floats]
"""The largest shift of each token `[N]`, nats, by a strength."""


def one_sided(
    evidence: Evidence, state: State, train: Mask, forms: Sequence[Form], group: Ints | None = None
) -> OneSided | None:
    """Fits a mixture of shifts, whose weights differ by how certain a token is.

    Args:
        evidence: The table.
        state: What is explained so far.
        train: `[N]` tokens to fit to.
        forms: Largest shifts; each is tried at several strengths.
        group: `[N]` a further key of the weights, from 0.

    Returns:
        None where there are too few tokens.
    """
    use = np.flatnonzero(train & state.known)
    if len(use) < _LEAST:
        return None
    few, fewest = (use[:: -(-len(use) // most)] for most in (_MOST, _MOST_FIRST))
    x, rest = uncertainty(state.expected), residual(evidence, state)
    level = np.searchsorted(np.quantile(x[few], np.linspace(0, 1, _BINS + 1)[1:-1]), x)
    bin_of = level if group is None else level + _BINS * group
    whole = _Table(rest, x, level, bin_of, state.spread, int(bin_of.max()) + 1)
    start = noise_of(evidence, state, train)
    tried = [(i, strength, start) for i in range(len(forms)) for strength in _STRENGTHS]
    which, strength, _ = _likeliest(whole, forms, fewest, tried, _ROUNDS)
    tried = [(which, strength, replace(start, degrees=degrees)) for degrees in _DEGREES]
    _, _, best = _likeliest(whole, forms, few, tried, _LAST_ROUNDS)
    tried = [(which, strength * factor, replace(start, degrees=best.noise.degrees)) for factor in _FINER]
    _, strength, mixture = _likeliest(whole, forms, few, tried, _LAST_ROUNDS)
    largest = forms[which](strength)
    joint = mixture.joint(whole, largest)
    density = _log_sum(joint)
    shift = np.exp(joint - density[:, None]) @ _STEPS * largest
    mean = float(np.abs(np.exp(mixture.log_weight) @ _STEPS)[bin_of[few]] @ np.abs(largest[few]) / len(few))
    return OneSided(which, density, np.asarray(shift), mean)


@dataclass(frozen=True)
class _Table:
    """Residuals `[n]`, log(1 − p), its level, bins of weights, and spread; how many bins there are."""

    rest: Floats
    x: Floats
    level: Ints
    bin: Ints
    spread: Floats
    n_bins: int

    def of(self, some: Ints) -> _Table:
        return _Table(self.rest[some], self.x[some], self.level[some], self.bin[some], self.spread[some], self.n_bins)


@dataclass(frozen=True)
class _Mixture:
    """Log weights `[K, J]` of shares of the largest shift, and noise around each."""

    log_weight: Floats
    noise: Noise

    def joint(self, table: _Table, largest: Floats) -> Floats:
        """`[n, J]` log densities."""
        scale = self.noise.scale(table.x, table.spread)
        z = (table.rest[:, None] - largest[:, None] * _STEPS) / scale[:, None]
        return np.asarray(t_log_density(z, self.noise.degrees) - np.log(scale)[:, None] + self.log_weight[table.bin])


def _likeliest(
    whole: _Table, forms: Sequence[Form], few: Ints, tried: Iterable[tuple[int, float, Noise]], rounds: int
) -> tuple[int, float, _Mixture]:
    """The likeliest mixture of some tokens, with the index of its form and its strength."""
    table = whole.of(few)
    best: tuple[float, int, float, _Mixture] | None = None
    for which, strength, noise in tried:
        largest = forms[which](strength)[few]
        mixture = _fitted(table, largest, noise, rounds)
        value = float(_log_sum(mixture.joint(table, largest)).sum())
        if best is None or value > best[0]:
            best = value, which, strength, mixture
    assert best is not None
    return best[1:]


def _fitted(table: _Table, largest: Floats, noise: Noise, rounds: int) -> _Mixture:
    one = _Mixture(
        np.full((table.n_bins, len(_STEPS)), -np.log(len(_STEPS))),
        Noise(noise.knots, noise.log_scale - 0.7, noise.degrees, 0.0),
    )
    in_bin, in_level = (
        (codes == np.arange(n)[:, None]).astype(np.float64)
        for codes, n in ((table.bin, table.n_bins), (table.level, _BINS))
    )
    some = np.flatnonzero(in_level.sum(1))
    knots = np.array([np.median(table.x[table.level == k]) for k in some])
    rising = np.diff(knots, prepend=-np.inf) > 0
    some, knots = some[rising], knots[rising]
    off = table.rest[:, None] - largest[:, None] * _STEPS
    for _ in range(rounds):
        joint = one.joint(table, largest)
        share = np.exp(joint - _log_sum(joint)[:, None])
        weights = in_bin @ share + 0.5
        squares = (off / one.noise.scale(table.x, table.spread)[:, None]) ** 2
        pulled = (share * (one.noise.degrees + 1) / (one.noise.degrees + squares) * squares).sum(1)
        change = 0.5 * np.log(np.maximum((in_level @ pulled)[some] / in_level.sum(1)[some], 1e-12))
        scale = np.maximum(np.interp(knots, one.noise.knots, one.noise.log_scale) + change, np.log(FLOOR))
        one = _Mixture(np.log(weights / weights.sum(1, keepdims=True)), Noise(knots, scale, noise.degrees, 0.0))
    return one


def _log_sum(values: Floats) -> Floats:
    """`[n]` log Σ exp over the columns of `[n, J]`."""
    largest = values.max(1)
    return np.asarray(largest + np.log(np.exp(values - largest[:, None]).sum(1)))
