"""Arms of a sweep: aggregation over seeds, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.arms import (
    Arm,
    ArmComparison,
    Run,
    compare_arms,
    compare_sweep,
    detectable_share,
    mean_over_runs,
    share_of_runs,
    summarise_arm,
)
from mismatch_probe.metrics.inference import holm


def arm(name: str, rewards: Sequence[float | None], collapsed: Sequence[int] = (), first_seed: int = 0) -> Arm:
    """Runs with consecutive seeds; `collapsed` are seeds, and runs without a reward have collapsed in any case."""
    runs = [Run(seed, r, r is None or seed in collapsed) for seed, r in enumerate(rewards, first_seed)]
    return Arm(name, tuple(runs))


def normal_arm(name: str, n: int, mean: float = 0.8, seed: int = 0, spread: float = 0.05) -> Arm:
    return arm(name, np.random.default_rng(seed).normal(mean, spread, n).clip(0, 1).tolist())


# Rewards over 64 problems, some of them of runs that diverged.
rewards = st.lists(st.one_of(st.none(), st.integers(0, 64).map(lambda k: k / 64)), min_size=0, max_size=12)


@st.composite
def two_arms(draw: Any) -> tuple[Arm, Arm]:
    first, second = draw(rewards), draw(rewards)
    collapsed = draw(st.sets(st.integers(0, 14)))
    return arm("fp16", first, collapsed), arm("bf16", second, collapsed, first_seed=draw(st.integers(0, 3)))


@settings(max_examples=80, deadline=None)
@given(two_arms())
def test_swapped_arms_flip_the_sign_and_nothing_else(arms: tuple[Arm, Arm]) -> None:
    here, there = compare_arms(*arms), compare_arms(arms[1], arms[0])
    assert there.reward == here.reward
    assert replace(there.collapse, why="") == replace(here.collapse, why="")  # it names the numbers of runs in order
    assert (there.first, there.second) == (here.second, here.first)
    assert there.n_collapsed == here.n_collapsed[::-1]
    assert (there.n_pairs, there.n_diverged, there.spread) == (here.n_pairs, here.n_diverged, here.spread)
    if here.difference.value is not None:
        assert there.difference.value == -here.difference.value
    if here.difference.ci_low is not None and here.difference.ci_high is not None:
        assert (there.difference.ci_low, there.difference.ci_high) == (
            -here.difference.ci_high,
            -here.difference.ci_low,
        )


@settings(max_examples=80, deadline=None)
@given(two_arms(), st.randoms(use_true_random=False))
def test_order_of_the_runs_does_not_matter(arms: tuple[Arm, Arm], random: Any) -> None:
    shuffled = [Arm(each.name, tuple(random.sample(each.runs, len(each.runs)))) for each in arms]
    assert compare_arms(shuffled[0], shuffled[1]) == compare_arms(*arms)
    assert summarise_arm(shuffled[0]) == summarise_arm(arms[0])


@settings(max_examples=80, deadline=None)
@given(two_arms(), st.integers(-3, 3))
def test_the_same_constant_in_both_changes_nothing(arms: tuple[Arm, Arm], constant: int) -> None:
    def moved(each: Arm) -> Arm:
        values = [(run, None if run.reward is None else run.reward + constant) for run in each.runs]
        return Arm(each.name, tuple(Run(run.seed, value, run.collapsed) for run, value in values))

    here, there = compare_arms(*arms), compare_arms(moved(arms[0]), moved(arms[1]), worst=constant)
    assert there == here  # sixty-fourths and small integers are exact


@settings(max_examples=80, deadline=None)
@given(two_arms())
def test_bounds(arms: tuple[Arm, Arm]) -> None:
    case = compare_arms(*arms)
    assert (case.reward.p_value is None) == (case.n_pairs < 8)
    if case.reward.p_value is not None:
        assert 2.0 ** (1 - case.n_pairs) <= case.reward.p_value <= 1
    if case.collapse.p_value is not None:
        assert 0 < case.collapse.p_value <= 1
    for test in (case.reward, case.collapse):
        assert test.p_holm == test.p_value
        assert test.detectable is not None or test.why  # never silent beside "no difference"
        assert (test.differs is None) == (test.p_value is None)
        assert test.p_value is not None or test.why


def test_interval_is_that_of_the_paired_t_test() -> None:
    first, second = normal_arm("a", 9, seed=1), normal_arm("b", 9, 0.7, seed=2)
    theirs = stats.ttest_rel([r.reward for r in first.runs], [r.reward for r in second.runs])
    case = compare_arms(first, second)
    interval = theirs.confidence_interval(0.95)
    assert (case.difference.ci_low, case.difference.ci_high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert case.spread == pytest.approx(theirs._standard_error * 3, rel=1e-9)


def test_means_and_shares_against_scipy() -> None:
    values = np.random.default_rng(0).normal(size=6)
    mean = mean_over_runs(values)
    interval = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert (mean.ci_low, mean.ci_high) == pytest.approx(interval, rel=1e-12)
    share = share_of_runs(2, 7)
    assert share.value == pytest.approx(2 / 7)
    assert (share.ci_low, share.ci_high) == pytest.approx((stats.beta.ppf(0.025, 2, 6), stats.beta.ppf(0.975, 3, 5)))
    assert (share_of_runs(0, 4).ci_low, share_of_runs(4, 4).ci_high) == (0.0, 1.0)
    assert share_of_runs(0, 4).ci_high == pytest.approx(1 - 0.025**0.25)


def test_where_there_is_no_interval() -> None:
    assert mean_over_runs([]).why == share_of_runs(0, 0).why == "no runs"
    assert mean_over_runs([0.5]).why == "no interval: fewer than 2 runs"
    assert mean_over_runs([0.1 + 0.2, 0.3, 0.3]).why == "no interval: all values are equal"
    assert mean_over_runs([0.3, 0.3 + 1e-9]).ci_low is not None


def test_coverage_of_the_mean() -> None:
    draws = np.random.default_rng(4).normal(0.7, 0.1, (4000, 5))
    covered = [m.ci_low < 0.7 < m.ci_high for m in map(mean_over_runs, draws) if m.ci_low and m.ci_high]  # type: ignore[operator]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.011)


def test_diverged_runs_count_as_the_worst_and_are_named() -> None:
    first, second = arm("a", [0.9] * 7 + [None]), arm("b", [0.8] * 6 + [None, 0.8])
    case = compare_arms(first, second, worst=-1.0)
    assert case.difference.value == pytest.approx((6 * 0.1 + 1.9 - 1.8) / 8)
    assert case.n_diverged == 2
    assert case.n_collapsed == (1, 1)
    summary = summarise_arm(first, worst=-1.0)
    assert summary.reward.value == pytest.approx((7 * 0.9 - 1) / 8)
    assert summary.reward.why == "diverged runs that count as -1: 1"
    assert (summary.n_runs, summary.n_collapsed, summary.n_diverged) == (8, 1, 1)
    assert summary.collapse_share.value == 1 / 8


def test_only_shared_seeds_are_paired_but_all_runs_are_counted() -> None:
    first, second = arm("a", [0.5, 0.6, 0.7, 0.9]), arm("b", [0.1, 0.2, 0.3, None], first_seed=2)
    case = compare_arms(first, second)
    assert case.n_pairs == 2
    assert case.difference.value == pytest.approx((0.7 - 0.1 + 0.9 - 0.2) / 2)
    assert case.difference.why == "over the 2 seeds that both arms have"
    assert case.n_diverged == 0  # the one that diverged is in no pair
    assert case.n_runs == (4, 4)
    assert case.n_collapsed == (0, 1)


def test_holm_over_the_sweep_each_outcome_on_its_own() -> None:
    base = normal_arm("base", 10, 0.5, seed=0)
    others = [normal_arm(f"arm {k}", 10, 0.5 + 0.03 * k, seed=k) for k in range(1, 4)]
    short = normal_arm("short", 3, seed=9)  # no test of rewards with it, and none of collapses
    short = Arm("short", short.runs[:2])
    cases = compare_sweep([(base, other) for other in [*others, short]])
    alone = [compare_arms(base, other) for other in [*others, short]]
    assert [case.reward.p_value for case in cases] == [case.reward.p_value for case in alone]
    assert [case.reward.p_holm for case in cases] == holm([case.reward.p_value for case in alone])
    assert [case.collapse.p_holm for case in cases] == holm([case.collapse.p_value for case in alone])
    assert {case.reward.n_tests for case in cases} == {3}
    for joint, single in zip(cases[:3], alone[:3], strict=True):
        assert joint.reward.detectable is not None
        assert single.reward.detectable is not None
        assert joint.reward.detectable > single.reward.detectable
    assert cases[3].reward.detectable == alone[3].reward.detectable  # of a t test, outside the family


def test_error_rate_of_a_whole_sweep() -> None:
    """Three comparisons with one base under the null: some reward differs in at most 5 % of sweeps."""
    rng = np.random.default_rng(12)

    def sweep() -> list[ArmComparison]:
        base, *others = (arm(str(k), row.tolist()) for k, row in enumerate(rng.normal(0.6, 0.1, (4, 8))))
        return compare_sweep([(base, other) for other in others])

    wrong = np.mean([any(case.reward.differs for case in sweep()) for _ in range(600)])
    assert wrong <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 600)


def test_five_pairs_are_never_tested_but_say_what_they_could_see() -> None:
    case = compare_arms(arm("fp16", [0.9, 0.91, 0.92, 0.93, 0.95]), arm("bf16", [0.1, 0.11, 0.12, 0.13, 0.16]))
    assert case.reward.p_value is None
    assert case.reward.differs is None
    assert case.reward.why == "the p of 5 pairs cannot be below 0.062: at least 8 pairs are needed"
    assert case.reward.detectable is not None
    assert case.collapse.differs is False
    assert case.collapse.detectable == pytest.approx(0.83, abs=0.005)


def test_four_runs_each_can_show_a_collapse() -> None:
    case = compare_arms(arm("fp16", [0.9] * 4), arm("bf16", [0.1] * 4, collapsed=[0, 1, 2, 3]))
    assert case.collapse.p_value == pytest.approx(2 / 70)
    assert case.collapse.differs
    assert case.n_collapsed == (0, 4)
    assert "all pairs have the same difference" in case.reward.why
    few = compare_arms(arm("fp16", [0.9] * 3), arm("bf16", [0.1] * 3, collapsed=[0, 1, 2]))
    assert few.collapse.p_value is None
    assert few.collapse.why == "no counts of collapses of 3 and 3 runs give p < 0.05"


def test_p_values_are_adjusted_within_their_family() -> None:
    better, worse = normal_arm("fp16", 8, 0.9, seed=1), normal_arm("bf16", 8, 0.6, seed=2)
    for pair, sign in (((better, worse), 1), ((worse, better), -1)):
        case = compare_arms(*pair)
        assert case.reward.differs
        assert case.reward.p_value == 2.0**-7
        assert np.sign(case.difference.value) == sign  # type: ignore[arg-type]
    in_family = compare_sweep([(better, worse), (better, better)])
    assert [case.reward.p_holm for case in in_family] == [2 * 2.0**-7, 1.0]


def test_too_many_comparisons_for_the_pairs() -> None:
    better, worse = normal_arm("fp16", 8, 0.9, seed=1), normal_arm("bf16", 8, 0.6, seed=2)
    case = compare_sweep([(better, worse)] * 7)[0]
    assert case.reward.p_value == 2.0**-7
    assert not case.reward.differs
    assert case.reward.detectable is None
    assert case.reward.why == "8 pairs cannot show any difference among 7 comparisons"
    assert case.collapse.detectable is not None


def test_detectable_share_starts_from_the_smaller_share() -> None:
    half = compare_arms(arm("a", [0.5] * 8, collapsed=range(4)), arm("b", [0.5] * 8, collapsed=range(5)))
    assert half.collapse.detectable is None
    assert half.collapse.why == "8 and 8 runs cannot reliably show that more than a share of 0.5 collapse"
    few, many = arm("a", [0.5] * 8), arm("b", [0.5] * 12)
    assert compare_arms(few, many).collapse == compare_arms(many, few).collapse
    assert compare_arms(few, many).collapse.detectable == detectable_share(0.0, 12, 8) != detectable_share(0.0, 8, 12)
    unequal = compare_arms(arm("a", [0.5] * 10, collapsed=range(5)), arm("b", [0.5] * 16, collapsed=range(2)))
    assert unequal.collapse.detectable == detectable_share(2 / 16, 16, 10) != detectable_share(2 / 16, 10, 16)


def test_arms_without_a_common_seed() -> None:
    case = compare_arms(arm("a", [0.5] * 8), arm("b", [0.5] * 8, first_seed=8))
    assert case.difference.value is None
    assert case.spread is None
    assert case.difference.why == "the arms share no seed"
    assert compare_sweep([]) == []


def test_what_is_no_run_and_no_arm() -> None:
    with pytest.raises(UsageError, match="seed 3 has no reward, yet did not collapse"):
        Run(3, None, False)
    with pytest.raises(UsageError, match="seed 3 has the reward nan"):
        Run(3, float("nan"), True)
    with pytest.raises(UsageError, match="arm x has the seed 1 twice"):
        Arm("x", (Run(1, 0.5, False), Run(1, 0.6, False)))
    with pytest.raises(UsageError, match=r"arm a has the reward -0\.5, below the worst, 0"):
        compare_arms(arm("a", [-0.5]), arm("b", [0.5]))
