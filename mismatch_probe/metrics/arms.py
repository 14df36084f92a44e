"""Whether the arms of an RL sweep differ.

The seed is the unit. Final reward and collapse are two questions, and each is a family of its own for Holm's
adjustment.

A run that diverged has no reward. Leaving such runs out would favour the arm that lost its worst ones, so they count as
the worst reward that the task can give, and every result says how many there are.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.inference import POWER, SIGNIFICANCE, Floats, Inference, holm
from mismatch_probe.metrics.intervals import join_why
from mismatch_probe.types import MetricValue

# Equal values, and their sums in another order, differ by rounding up to this share of them.
_ROUNDING = 1e-12
MIN_PAIRS = 8
# Up to here all patterns of signs are tried, beyond it as many random ones.
_ENUMERATED_PAIRS = 16
_RANDOM_PATTERNS = 2**16 - 1


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        seed: Unique within its arm.
        reward: Final reward, or any other outcome of which more is better; None where the run diverged.
        collapsed: Whether it collapsed or diverged.
    """

    seed: int
    reward: float | None
    collapsed: bool

    def __post_init__(self) -> None:
        if self.reward is None and not self.collapsed:
            raise UsageError(
                f"The run with seed {self.seed} has no reward, yet did not collapse.",
                "Leave out runs that did not end; a run that diverged has collapsed=True.",
            )
        if self.reward is not None and not math.isfinite(self.reward):
            raise UsageError(
                f"The run with seed {self.seed} has the reward {self.reward}.",
                "Give a finite reward, or none and collapsed=True where the run diverged.",
            )


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        seeds = [run.seed for run in self.runs]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            raise UsageError(f"The arm {self.name} has the seed {twice[0]} twice.", "Give each run its own seed.")

    @property
    def n_collapsed(self) -> int:
        return sum(bool(run.collapsed) for run in self.runs)

    def rewards(self, worst: float) -> dict[int, float]:
        """Reward by seed, in the order of seeds; `worst` for runs that diverged.

        Raises:
            UsageError: A run has less than the worst reward.
        """
        runs = sorted(self.runs, key=lambda run: run.seed)
        rewards = {run.seed: worst if run.reward is None else float(run.reward) for run in runs}
        if rewards and min(rewards.values()) < worst:
            raise UsageError(
                f"The arm {self.name} has the reward {min(rewards.values()):g}, below the worst, {worst:g}.",
                "Give the lowest reward of the task as worst.",
            )
        return rewards


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds.

    Attributes:
        name: The arm's.
        n_runs: Runs, one per seed.
        n_collapsed: Those that collapsed or diverged.
        n_diverged: Those without a reward, which count as the worst.
        reward: Mean over runs with its 95 % t interval.
        collapse_share: Share of runs that collapsed, with its 95 % interval (Clopper and Pearson 1934).
    """

    name: str
    n_runs: int
    n_collapsed: int
    n_diverged: int
    reward: MetricValue
    collapse_share: MetricValue


def mean_over_runs(values: ArrayLike) -> MetricValue:
    """Mean of one value per run, `[n]`, with its 95 % t interval; it has none below 2 runs or where all are equal."""
    given = np.asarray(values, dtype=np.float64)
    if not len(given):
        return MetricValue(None, why="no runs")
    mean = float(given.mean())
    if len(given) < 2:
        return MetricValue(mean, why="no interval: fewer than 2 runs")
    spread = spread_of(given)
    if spread == 0:
        return MetricValue(mean, why="no interval: all values are equal")
    return MetricValue(mean, *Inference(mean, spread / math.sqrt(len(given)), len(given) - 1.0, len(given)).limits)


def share_of_runs(hits: int, n_runs: int) -> MetricValue:
    """Share of runs with a property and its 95 % interval (Clopper and Pearson 1934); runs are independent."""
    if not n_runs:
        return MetricValue(None, why="no runs")
    interval = stats.binomtest(hits, n_runs).proportion_ci(method="exact")
    return MetricValue(hits / n_runs, float(interval.low), float(interval.high))


def summarise_arm(arm: Arm, *, worst: float = 0.0) -> ArmSummary:
    """Mean reward and share of collapses of an arm. `worst` and errors as for `compare_sweep`."""
    n_diverged = sum(run.reward is None for run in arm.runs)
    reward = mean_over_runs(list(arm.rewards(worst).values()))
    if n_diverged:
        reward = replace(reward, why=join_why(f"diverged runs that count as {worst:g}: {n_diverged}", reward.why))
    share = share_of_runs(arm.n_collapsed, len(arm.runs))
    return ArmSummary(arm.name, len(arm.runs), arm.n_collapsed, n_diverged, reward, share)


def spread_of(values: Floats) -> float:
    """Standard deviation of at least 2 values; exactly 0 where they differ by rounding alone."""
    return 0.0 if np.ptp(values) <= _ROUNDING * np.abs(values).max() else float(values.std(ddof=1))


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


@dataclass(frozen=True)
class ArmTest:
    """A test of one outcome in two arms.

    Attributes:
        p_value: Two-sided; None where so few runs could not have shown anything.
        p_holm: The same adjusted over the tests of this outcome in the sweep (Holm 1979).
        n_tests: How many these are.
        detectable: Smallest effect that would have been shown with 80 % probability, at 5 % over `n_tests`, which is
            what Holm asks of the smallest p; None where no effect would have been, or none can be told.
        why: Why there is no p-value or no detectable effect, or what limits them.
    """

    p_value: float | None = None
    p_holm: float | None = None
    n_tests: int = 0
    detectable: float | None = None
    why: str = ""

    @property
    def differs(self) -> bool | None:
        """Whether the arms differ after the adjustment; None where that was not tested."""
        return None if self.p_holm is None else self.p_holm < SIGNIFICANCE


@dataclass(frozen=True)
class ArmComparison:
    """Two arms.

    Attributes:
        first: Name of the one arm.
        second: Name of the other.
        n_pairs: Seeds that both arms have.
        n_diverged: Runs of these pairs without a reward, which count as the worst.
        difference: Mean reward of `first` less that of `second` over the pairs, with its 95 % t interval (not
            adjusted). The test does not rest on it: the two can disagree where differences are far from normal.
        spread: Standard deviation of the differences; None below 2 pairs.
        reward: Sign-flip test of `difference`. Its detectable effect is a true mean difference, for normal differences
            of that spread; below `MIN_PAIRS` pairs that of a t test.
        n_runs: Runs of either arm, paired or not.
        n_collapsed: How many of them collapsed.
        collapse: Fisher's exact test of these counts. Its detectable effect is a share of runs that collapse in one
            arm, where the other has the smaller of the two observed shares.
    """

    first: str
    second: str
    n_pairs: int
    n_diverged: int
    difference: MetricValue
    spread: float | None
    reward: ArmTest
    n_runs: tuple[int, int]
    n_collapsed: tuple[int, int]
    collapse: ArmTest


def compare_arms(first: Arm, second: Arm, *, worst: float = 0.0) -> ArmComparison:
    """Two arms, as the only comparison of a sweep; see `compare_sweep`."""
    return compare_sweep([(first, second)], worst=worst)[0]


def compare_sweep(pairs: Iterable[tuple[Arm, Arm]], *, worst: float = 0.0) -> list[ArmComparison]:
    """All comparisons of a sweep, each outcome as one family of tests.

    Args:
        pairs: The arms to compare, two and two.
        worst: The lowest reward that the task can give: what a run that diverged counts as.

    Raises:
        UsageError: A run has less than the worst reward.
    """
    cases = [_case(first, second, worst) for first, second in pairs]
    rewards = _adjusted([case.reward for case in cases])
    collapses = _adjusted([case.collapse for case in cases])
    return [
        replace(case, reward=_with_difference(reward, case), collapse=_with_share(collapse, case))
        for case, reward, collapse in zip(cases, rewards, collapses, strict=True)
    ]


def _case(first: Arm, second: Arm, worst: float) -> ArmComparison:
    """Everything but what depends on the other comparisons."""
    one, other = first.rewards(worst), second.rewards(worst)
    shared = sorted(one.keys() & other.keys())
    differences = np.array([one[seed] - other[seed] for seed in shared])
    difference = mean_over_runs(differences) if shared else MetricValue(None, why="the arms share no seed")
    if max(len(one), len(other)) > len(shared) > 0:
        seeds = f"over the {len(shared)} seeds that both arms have"
        difference = replace(difference, why=join_why(seeds, difference.why))
    n_runs, n_collapsed = (len(one), len(other)), (first.n_collapsed, second.n_collapsed)
    return ArmComparison(
        first=first.name,
        second=second.name,
        n_pairs=len(shared),
        n_diverged=sum(run.reward is None and run.seed in shared for arm in (first, second) for run in arm.runs),
        difference=difference,
        spread=spread_of(differences) if len(shared) > 1 else None,
        reward=_sign_flip_test(differences),
        n_runs=n_runs,
        n_collapsed=n_collapsed,
        collapse=_fisher_test(n_collapsed, n_runs),
    )


def _adjusted(tests: Sequence[ArmTest]) -> list[ArmTest]:
    p_values = [test.p_value for test in tests]
    n_tests = len(p_values) - p_values.count(None)
    return [replace(test, p_holm=p, n_tests=n_tests) for test, p in zip(tests, holm(p_values), strict=True)]


def _sign_flip_test(differences: Floats) -> ArmTest:
    n = len(differences)
    if n >= MIN_PAIRS:
        return ArmTest(sign_flip_p(differences))
    if n == 0:
        return ArmTest(why="the arms share no seed")
    smallest = f"the p of {n} pairs cannot be below {2.0 ** (1 - n):.2g}"
    return ArmTest(why=f"{smallest}: at least {MIN_PAIRS} pairs are needed")


def _fisher_test(hits: tuple[int, int], n_runs: tuple[int, int]) -> ArmTest:
    if fisher_can_show(n_runs):
        return ArmTest(fisher_p(hits, n_runs))
    return ArmTest(why=f"no counts of collapses of {n_runs[0]} and {n_runs[1]} runs give p < {SIGNIFICANCE:g}")


def _with_difference(test: ArmTest, case: ArmComparison) -> ArmTest:
    if not case.spread:
        reason = "too few pairs" if case.spread is None else "all pairs have the same difference"
        return replace(test, why=join_why(test.why, f"the smallest detectable difference is unknown: {reason}"))
    detectable = detectable_difference(case.spread, case.n_pairs, test.n_tests)
    if detectable is None:
        why = f"{case.n_pairs} pairs cannot show any difference among {test.n_tests} comparisons"
        return replace(test, why=join_why(test.why, why))
    return replace(test, detectable=detectable)


def _with_share(test: ArmTest, case: ArmComparison) -> ArmTest:
    if test.p_value is None:
        return test
    shares = [(k / n, -n, n) for k, n in zip(case.n_collapsed, case.n_runs, strict=True)]
    (share, _, n), (_, _, other) = sorted(shares)  # of equal shares that of more runs counts as known
    detectable = detectable_share(share, n, other, test.n_tests)
    if detectable is None:
        among = f" among {test.n_tests} comparisons" if test.n_tests > 1 else ""
        why = f"{n} and {other} runs cannot reliably show that more than a share of {share:.2g} collapse{among}"
        return replace(test, why=join_why(test.why, why))
    return replace(test, detectable=detectable)
