"""Whether the arms of an RL sweep differ.

Rewards are compared within pairs of runs with the same seed, collapses by their counts, by tests that so few runs can
support: `seed_tests.py` says which, and why 8 pairs. Final reward and collapse are two questions, and each is a family
of its own for Holm's adjustment. `runs.py` says what a run that diverged counts as.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mismatch_probe.metrics.inference import Floats
from mismatch_probe.metrics.intervals import join_why
from mismatch_probe.metrics.multiplicity import SIGNIFICANCE, holm
from mismatch_probe.metrics.runs import Arm as Arm
from mismatch_probe.metrics.runs import Run as Run
from mismatch_probe.metrics.runs import mean_over_runs, spread_of
from mismatch_probe.metrics.seed_tests import (
    MIN_PAIRS,
    detectable_difference,
    detectable_share,
    fisher_can_show,
    fisher_p,
    sign_flip_p,
)
from mismatch_probe.types import MetricValue


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
