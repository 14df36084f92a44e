"""Tests of two arms of a sweep that so few runs can support, and the effects that they would show.

Rewards are compared within pairs of runs with the same seed, by the sign-flip permutation test of the mean difference
(Fisher 1935): where the arms do not matter, a pair's difference is as likely to have either sign. It is exact for any
law of rewards, ties included, and tests the very mean that is reported; Wilcoxon's test has no exact law under ties,
which rewards over few problems have, and says nothing about a mean. n pairs have 2ⁿ patterns of signs, each with a
mirror image, so no p is below 2^(1−n):

    pairs             5     6     7     8      10
    smallest p      .062  .031  .016  .0078  .0020

It doubles with every pair without a difference, and Holm's adjustment multiplies it by the number of comparisons. Six
pairs would serve for a single comparison in which every pair differs the same way. `MIN_PAIRS` = 8 leaves room for two
pairs without a difference, or for six comparisons.

Collapses are compared by Fisher's exact test of their counts. It ignores the pairing, which makes it cautious where
runs with the same seed are alike.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from mismatch_probe.metrics.inference import Floats
from mismatch_probe.metrics.multiplicity import POWER, SIGNIFICANCE

MIN_PAIRS = 8
# Up to here all patterns of signs are tried, beyond it as many random ones.
_ENUMERATED_PAIRS = 16
_RANDOM_PATTERNS = 2**16 - 1
# Sums of the same differences in another order are ties that rounding can break.
_ROUNDING = 1e-12


def sign_flip_p(differences: Floats) -> float:
    """Two-sided p-value of the mean of `[n ≥ 1]` paired differences being 0.

    Returns:
        The share of patterns of signs whose mean is at least as far from 0: of all 2ⁿ up to 16 pairs; beyond, of
        65,535 random ones and the observed one, always the same ones (Phipson and Smyth 2010).
    """
    sizes = np.sort(np.abs(differences))  # all that the patterns depend on, so the order of the pairs does not matter
    reached = abs(math.fsum(differences)) - _ROUNDING * sizes.sum()
    n = len(sizes)
    if n <= _ENUMERATED_PAIRS:
        patterns = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1  # the largest is never flipped: mirror images
        return float((np.abs((1 - 2 * patterns) @ sizes) >= reached).mean())
    patterns = np.random.default_rng(0).integers(0, 2, (_RANDOM_PATTERNS, n), dtype=np.int8)
    as_far = int((np.abs((1 - 2 * patterns) @ sizes) >= reached).sum())
    return (as_far + 1) / (_RANDOM_PATTERNS + 1)


def detectable_difference(spread: float, n_pairs: int, n_tests: int = 1) -> float | None:
    """Smallest true mean difference that the sign-flip test shows with 80 % probability, for normal differences.

    The power is that of a paired t test (noncentral t) at the largest level that the test can attain below
    0.05 / `n_tests`. Where only the one pattern of equal signs rejects, it is the probability of that pattern. With 8
    pairs the true power at the effect is .75 to .80, with 10 .72 to .80 (simulated, up to 12 tests).

    Args:
        spread: Standard deviation of the differences.
        n_pairs: Number of pairs. Below `MIN_PAIRS` there is no such test, and the effect is that of a t test at 0.05.
        n_tests: Tests in the family; 0.05 over this is what Holm's adjustment asks of the smallest p-value.

    Returns:
        None where no difference can be shown, however large.
    """
    if n_pairs < 2:
        return None
    if n_pairs < MIN_PAIRS:
        return _t_effect(SIGNIFICANCE, n_pairs) * spread
    patterns = 2.0 ** min(n_pairs - 1, 50)
    rejecting = math.ceil(SIGNIFICANCE / max(1, n_tests) * patterns) - 1
    if rejecting < 1:
        return None
    if rejecting == 1:
        return float(special.ndtri(POWER ** (1 / n_pairs))) * spread
    return _t_effect(rejecting / patterns, n_pairs) * spread


def _t_effect(level: float, n_pairs: int) -> float:
    """Mean over standard deviation at which a two-sided t test at `level` has the wanted power."""
    critical = special.stdtrit(n_pairs - 1, 1 - level / 2)
    return float(special.nctdtrinc(n_pairs - 1, 1 - POWER, critical)) / math.sqrt(n_pairs)


def fisher_can_show(n_runs: tuple[int, int]) -> bool:
    """Whether any outcome of so many runs of two arms gives a p-value below 0.05."""
    return bool(_fisher_table(*n_runs).min() < SIGNIFICANCE)


def fisher_p(hits: tuple[int, int], n_runs: tuple[int, int]) -> float:
    """Two-sided p-value of two shares being equal (Fisher's exact test)."""
    return float(_fisher_table(*n_runs)[hits])


def detectable_share(share: float, n_runs: int, other_runs: int, n_tests: int = 1) -> float | None:
    """Smallest share that Fisher's test tells from a smaller one with 80 % probability.

    Args:
        share: The smaller true share.
        n_runs: Runs of the arm that has it.
        other_runs: Runs of the arm that has the larger one.
        n_tests: As for `detectable_difference`.

    Returns:
        None where no larger share is told from it.
    """
    rejected = _fisher_table(n_runs, other_runs) < SIGNIFICANCE / max(1, n_tests)
    by_count = stats.binom.pmf(np.arange(n_runs + 1), n_runs, share) @ rejected

    def excess_power(other: float) -> float:
        return float(by_count @ stats.binom.pmf(np.arange(other_runs + 1), other_runs, other)) - POWER

    return float(optimize.brentq(excess_power, share, 1.0)) if excess_power(1.0) >= 0 else None


@lru_cache(maxsize=64)
def _fisher_table(n: int, other: int) -> NDArray[np.float64]:
    """`[n+1, other+1]` p-values by the two counts, in integers: scipy takes a second for all of 20 runs each."""
    table = np.empty((n + 1, other + 1))
    for hits in range(n + other + 1):
        ways = {i: math.comb(n, i) * math.comb(other, hits - i) for i in range(max(0, hits - other), min(n, hits) + 1)}
        for i, way in ways.items():
            table[i, hits - i] = sum(w for w in ways.values() if w <= way) / math.comb(n + other, hits)
    return table
