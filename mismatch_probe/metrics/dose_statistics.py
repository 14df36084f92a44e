"""What relates the outcome of arms to their dose, and intervals over few seeds.

Arms are the fixed settings of a sweep, so intervals resample the seeds, the same ones in every arm: percentile
intervals, expanded for few seeds (Hesterberg 2015, section 5.3). They say what other seeds would have given. Noise
between seeds disorders arms that differ little, which pulls every rank correlation towards 0, and no interval makes up
for that: it does not cover the correlation of arms without noise. Where the dose does nothing it excludes 0 in 2 to 4 %
of sweeps (simulated, 5 to 12 arms, 5 to 12 seeds).

Shape legend: `A` arms, `S` seeds that all arms have, `R` replicates.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, special, stats

from mismatch_probe.metrics.inference import Floats, Interval, student

_USABLE_SHARE = 0.99


def rank_correlation(dose: Floats, outcome: Floats) -> Floats:
    """Spearman's, of `[R, A]` and `[R, A]`, row by row: `[R]`; NaN where all of a row are equal."""
    ranks = [stats.rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (dose, outcome)]
    with np.errstate(invalid="ignore"):
        squares = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
        return np.asarray((ranks[0] * ranks[1]).sum(axis=1) / squares)


def left_over(dose: Floats, outcome: Floats, *, rising: bool) -> Floats:
    """Share of the variance of the outcome over arms that is left around the best monotone curve of the dose.

    Least squares (isotonic regression), arms of the same dose on one point of the curve. In sample: the curve takes up
    part of the noise.

    Args:
        dose: `[R, A]`.
        outcome: `[R, A]`.
        rising: Whether the curve may only rise, or only fall.

    Returns:
        `[R]`, in [0, 1]; NaN where all outcomes of a row are equal.
    """
    shares = np.full(len(dose), np.nan)
    for row, (x, y) in enumerate(zip(dose, outcome, strict=True)):
        total = ((y - y.mean()) ** 2).sum()
        if np.ptp(y) == 0:
            continue
        group, n = np.unique(x, return_inverse=True, return_counts=True)[1:]
        means = np.bincount(group, weights=y) / n
        curve = optimize.isotonic_regression(means, weights=n, increasing=rising).x
        shares[row] = ((y - curve[group]) ** 2).sum() / total
    return shares


def seed_share(outcome: Floats) -> float:
    """Share of the variance between the means of arms that noise of the seeds would give, at most 1.

    What a seed does to all arms alike moves no arm against another, so it is taken off first (two-way analysis of
    variance without interaction).

    Args:
        outcome: `[A ≥ 2, S ≥ 2]`; the arms' means are not all equal.
    """
    n_arms, n_seeds = outcome.shape
    rest = outcome - outcome.mean(axis=1, keepdims=True) - outcome.mean(axis=0) + outcome.mean()
    noise = (rest**2).sum() / ((n_arms - 1) * (n_seeds - 1)) / n_seeds
    return min(1.0, float(noise / outcome.mean(axis=1).var(ddof=1)))


def resampled_means(tables: Floats, *, seed: int, replicates: int) -> Floats:
    """Means over seeds drawn with replacement, the same in every arm and table: `[K, A, S]` to `[K, R, A]`."""
    n_seeds = tables.shape[2]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=replicates)
    return np.asarray(counts @ tables.transpose(0, 2, 1) / n_seeds)


def expanded_interval(value: float, draws: Floats, n_seeds: int) -> Interval | None:
    """95 % percentile interval of `[R]` replicates over `n_seeds` seeds; None where too many are undefined.

    For a mean it has the length of Student's interval, which plain percentiles of few seeds fall short of.
    """
    usable = draws[np.isfinite(draws)]
    if len(usable) < _USABLE_SHARE * len(draws):
        return None
    tail = float(special.ndtr(-student(n_seeds - 1) * math.sqrt(n_seeds / (n_seeds - 1))))
    low, high = np.quantile(usable, (tail, 1 - tail))
    return min(value, float(low)), max(value, float(high))
