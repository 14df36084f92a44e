"""Noise of a log-prob around what is expected of it: Student's t, whose scale depends on how certain the token is.

What is certain hardly moves when logits do: near p = 1 a log-prob moves with 1 − p. So the scale is a curve over
log(1 − p), fitted at a few quantiles.

Shape legend: `n` tokens, `K` knots of the curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Floats = NDArray[np.float64]

DEGREES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Degrees of freedom that are tried."""
FLOOR = 1e-7
"""Least scale, nats: FP32's rounding of a log-prob."""
_MOST_KNOTS, _TOKENS_A_KNOT = 8, 60
_ROUNDS, _FIRST_ROUNDS = 4, 8
_LEAST_UNCERTAIN = 1e-12


def uncertainty(logprob: Floats) -> Floats:
    """`[n]` log(1 − p) of log-probs `[n]`, at least log 1e-12; of a log-prob above 0 that of 0."""
    return np.asarray(np.log(np.maximum(-np.expm1(np.minimum(logprob, 0.0)), _LEAST_UNCERTAIN)))


@dataclass(frozen=True)
class Noise:
    """A fitted model of noise.

    Attributes:
        knots: `[K]` values of log(1 − p), increasing.
        log_scale: `[K]` log of the scale in nats.
        degrees: Degrees of freedom.
        drift: κ; the mean is −κ·scale²/2. 1 where noise of logits moves the trainer off the distribution that was
            sampled, −1 where the trainer's is that distribution.
    """

    knots: Floats
    log_scale: Floats
    degrees: float
    drift: float

    def scale(self, x: Floats, spread: Floats | float = 0.0) -> Floats:
        """`[n]` nats, of tokens whose log(1 − p) is `x` `[n]`, times exp(`spread`)."""
        return np.asarray(np.maximum(np.exp(np.interp(x, self.knots, self.log_scale) + spread), FLOOR))

    def log_density(self, residual: Floats, x: Floats, spread: Floats | float = 0.0) -> Floats:
        """`[n]` of residuals `[n]` in nats."""
        scale = self.scale(x, spread)
        centred = residual + self.drift * np.minimum(scale, 1.0) ** 2 / 2
        return np.asarray(t_log_density(centred / scale, self.degrees) - np.log(scale))


def t_log_density(z: Floats, degrees: float) -> Floats:
    """`[n]` log density of Student's t at `z` `[n]`."""
    constant = gammaln((degrees + 1) / 2) - gammaln(degrees / 2) - 0.5 * np.log(degrees * np.pi)
    return np.asarray(constant - (degrees + 1) / 2 * np.log1p(z * z / degrees))


def fit_noise(
    residual: Floats,
    x: Floats,
    spread: Floats | float = 0.0,
    weight: Floats | None = None,
    tried: tuple[float, ...] = DEGREES,
) -> Noise:
    """Fits scale, degrees of freedom and drift by maximum likelihood, by turns.

    Args:
        residual: `[n]` nats.
        x: `[n]` log(1 − p) of what was expected.
        spread: `[n]` log of what the scale is multiplied with at a token.
        weight: `[n]` how much a token counts; None for all alike.
        tried: Degrees of freedom to choose from, in increasing order.
    """
    z = residual / np.exp(spread)
    weight = np.ones_like(residual) if weight is None else weight
    if len(residual) == 0:
        return Noise(np.zeros(1), np.full(1, np.log(FLOOR)), 5.0, 0.0)
    n_knots = int(np.clip(len(residual) // _TOKENS_A_KNOT, 1, _MOST_KNOTS))
    knots, bin_of = _bins(x, n_knots)
    squares = z * z
    total = np.maximum(np.bincount(bin_of, weight, len(knots)), 1e-12)
    scale = np.maximum(
        np.sqrt(np.bincount(bin_of, weight * np.minimum(squares, np.quantile(squares, 0.9)), len(knots)) / total), FLOOR
    )
    best, best_value = None, -np.inf
    for degrees in tried:
        fitted = scale
        for _ in range(_ROUNDS if best else _FIRST_ROUNDS):
            u = squares / fitted[bin_of] ** 2
            responsibility = (degrees + 1) / (degrees + u)
            fitted = np.maximum(
                np.sqrt(np.bincount(bin_of, weight * responsibility * squares, len(knots)) / total), FLOOR
            )
        value = float((weight * (t_log_density(z / fitted[bin_of], degrees) - np.log(fitted[bin_of]))).sum())
        if value > best_value:
            best, best_value = (fitted, degrees), value
        scale = fitted
    assert best is not None
    log_scale, degrees = np.log(best[0]), best[1]
    drifts = [
        (float((weight * Noise(knots, log_scale, degrees, k).log_density(residual, x, spread)).sum()), k)
        for k in (0.0, 1.0, -1.0)
    ]
    drift = max(drifts, key=lambda one: one[0] - (0.0 if one[1] == 0 else 2.0))[1]
    return Noise(knots, log_scale, degrees, drift)


def _bins(x: Floats, n: int) -> tuple[Floats, NDArray[np.int64]]:
    """Medians of quantile bins, `[K]`, and the bin of each value, `[n]`."""
    edges = np.unique(np.quantile(x, np.linspace(0, 1, n + 1)[1:-1])) if n > 1 else np.empty(0)
    bin_of = np.searchsorted(edges, x, side="left")
    present, bin_of = np.unique(bin_of, return_inverse=True)
    order = np.argsort(bin_of, kind="stable")
    bounds = np.searchsorted(bin_of[order], np.arange(len(present) + 1))
    middles = np.array([np.median(x[order[lo:hi]]) for lo, hi in pairwise(bounds.tolist())])
    keep = np.diff(middles, prepend=-np.inf) > 0
    return (
        (middles, bin_of) if keep.all() else (np.maximum.accumulate(middles) + 1e-9 * np.arange(len(middles)), bin_of)
    )
