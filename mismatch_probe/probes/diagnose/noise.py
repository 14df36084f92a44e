"""Noise of a log-prob around what is expected of it: Student's t, whose scale depends on how certain the token is.

What is certain hardly moves when logits do: near p = 1 a log-prob moves with 1 − p. So the scale is a curve over
log(1 − p), fitted at a few quantiles.

Shape legend: `n` tokens, `K` knots of the curve.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    knots, bin_of = bins(x)
    scale = _first_scale(z, bin_of, weight)
    best, best_value = None, -np.inf
    for degrees in tried:
        fitted, value = _fitted_scale(z, bin_of, weight, scale, degrees, _ROUNDS if best else _FIRST_ROUNDS)
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


def _first_scale(z: Floats, bin_of: NDArray[np.int64], weight: Floats) -> Floats:
    """`[K]` root mean squares, the largest tenth of them cut."""
    squares = np.minimum(z * z, np.quantile(z * z, 0.9))
    total = np.maximum(np.bincount(bin_of, weight), 1e-12)
    return np.asarray(np.maximum(np.sqrt(np.bincount(bin_of, weight * squares) / total), FLOOR))


def _fitted_scale(
    z: Floats, bin_of: NDArray[np.int64], weight: Floats, scale: Floats, degrees: float, rounds: int
) -> tuple[Floats, float]:
    """`[K]` scales under Student's t from some scales on, and the log-likelihood."""
    squares = z * z
    for _ in range(rounds):
        # EM whose prior scale is fitted too converges in a few rounds (Liu, Rubin and Wu 1998).
        share = weight / (degrees + squares / scale[bin_of] ** 2)
        total = np.maximum(np.bincount(bin_of, share), 1e-300)
        scale = np.maximum(np.sqrt(np.bincount(bin_of, share * squares) / total), FLOOR)
    of_token = scale[bin_of]
    return scale, float((weight * (t_log_density(z / of_token, degrees) - np.log(of_token))).sum())


def quick_likelihood(residual: Floats, bin_of: NDArray[np.int64], spread: Floats) -> float:
    """Log-likelihood of residuals `[n]` under Student's t with a scale by bin: enough to compare expectations."""
    z, weight = residual / np.exp(spread), np.ones_like(residual)
    _, value = _fitted_scale(z, bin_of, weight, _first_scale(z, bin_of, weight), 3.0, _ROUNDS)
    return value - float(spread.sum())


def bins(x: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Medians of quantile bins, `[K]`, and the bin of each value, `[n]`."""
    n = int(np.clip(len(x) // _TOKENS_A_KNOT, 1, _MOST_KNOTS))
    ordered = np.sort(x)
    at = np.searchsorted(np.unique(ordered[np.arange(1, n) * len(x) // n]), x)
    counts = np.bincount(at)
    bin_of, counts = (np.cumsum(counts > 0) - 1)[at], counts[counts > 0]
    middles = ordered[np.cumsum(counts) - counts + counts // 2]
    # Equal values can be the middle of two bins.
    return np.maximum.accumulate(middles) + 1e-9 * np.arange(len(middles)), bin_of
