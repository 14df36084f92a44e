"""Which dose the outcome of arms follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.arms import Arm, Run, compare_sweep
from mismatch_probe.metrics.dose import (
    DosedArm,
    DoseResponse,
    dose_response,
    expanded_interval,
    left_over,
    rank_correlation,
    resampled_means,
    seed_share,
)

Array = NDArray[np.float64]
# Few distinct values, so ties are frequent.
outcomes = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=3, max_size=9)


def rows(values: list[tuple[int, int]]) -> tuple[Array, Array]:
    x, y = np.array(values, dtype=np.float64).T
    return x[None, :], y[None, :]


@settings(max_examples=80, deadline=None)
@given(outcomes)
def test_rank_correlation_equals_scipy(values: list[tuple[int, int]]) -> None:
    x, y = rows(values)
    ours = rank_correlation(x, y)[0]
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(ours)
        return
    assert ours == pytest.approx(stats.spearmanr(x[0], y[0]).statistic, abs=1e-12)
    assert rank_correlation(np.exp(x), -y)[0] == pytest.approx(-ours, abs=1e-12)
    assert rank_correlation(np.vstack([y, x]), np.vstack([x, x]))[1] == pytest.approx(1.0)


def left_by_increments(x: Array, y: Array, rising: bool) -> float:
    """A monotone curve is a constant and one non-negative step per level: bounded least squares."""
    levels = np.unique(x)
    steps = (x[:, None] >= levels[1:]) * (1.0 if rising else -1.0)
    design = np.hstack([np.ones((len(x), 1)), steps])
    lower = np.r_[-np.inf, np.zeros(len(levels) - 1)]
    rest = optimize.lsq_linear(design, y, bounds=(lower, np.inf), method="bvls", tol=1e-14).cost * 2
    return float(rest / ((y - y.mean()) ** 2).sum())


@settings(max_examples=80, deadline=None)
@given(outcomes, st.booleans())
def test_left_over_equals_bounded_least_squares(values: list[tuple[int, int]], rising: bool) -> None:
    x, y = rows(values)
    ours = left_over(x, y, rising=rising)[0]
    if np.ptp(y) == 0:
        assert np.isnan(ours)
        return
    assert ours == pytest.approx(left_by_increments(x[0], y[0], rising), abs=1e-8)
    assert -1e-12 <= ours <= 1 + 1e-12
    assert left_over(x**3, 2 * y - 5, rising=rising)[0] == pytest.approx(
        ours, abs=1e-9
    )  # only the order of doses counts
    assert left_over(-x, y, rising=not rising)[0] == pytest.approx(ours, abs=1e-9)
    order = np.random.default_rng(0).permutation(x.shape[1])
    assert left_over(x[:, order], y[:, order], rising=rising)[0] == pytest.approx(ours, abs=1e-9)


def test_left_over_of_known_curves() -> None:
    x, y = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[0.0, 3.0, 3.0, 9.0]])
    assert left_over(x, y, rising=True)[0] == 0
    assert left_over(x, y, rising=False)[0] == pytest.approx(1)  # the best falling curve is the mean
    swapped = np.array([[0.0, 3.0, 1.0, 4.0]])  # fit 0, 2, 2, 4: 2 of 10 are left
    assert left_over(x, swapped, rising=True)[0] == pytest.approx(0.2)
    tied = np.array([[1.0, 2.0, 2.0, 3.0]])  # arms of one dose share a point, whatever their order
    assert left_over(tied, y, rising=True)[0] == 0
    assert left_over(tied, swapped, rising=True)[0] == pytest.approx(0.2)
    assert left_over(np.ones((1, 4)), y, rising=True)[0] == pytest.approx(1)


def test_seed_share_is_the_residual_of_a_regression_on_arms_and_seeds() -> None:
    rng = np.random.default_rng(3)
    y = rng.normal(size=(5, 7)) + rng.normal(0, 0.3, (5, 1)) + 4 * rng.normal(size=7)
    arm, seed = (index.ravel() for index in np.indices(y.shape))
    dummies = np.hstack([np.eye(5)[arm], np.eye(7)[seed][:, 1:]])
    rest = y.ravel() - dummies @ np.linalg.lstsq(dummies, y.ravel(), rcond=None)[0]
    expected = rest @ rest / (35 - 11) / 7 / y.mean(axis=1).var(ddof=1)
    assert seed_share(y) == pytest.approx(min(1.0, expected), rel=1e-9)
    assert seed_share(y + 10 * np.arange(7)) == pytest.approx(seed_share(y), rel=1e-9)


def test_seed_share_on_average() -> None:
    """Arms with variance .04 between them and noise .16/8 on each mean: a third."""
    rng = np.random.default_rng(4)
    arms = rng.normal(0, 0.2, (400, 40, 1))
    found = [seed_share(each + rng.normal(0, 0.4, (40, 8)) + rng.normal(0, 1, 8)) for each in arms]
    assert np.median(found) == pytest.approx(1 / 3, abs=0.03)
    assert max(seed_share(rng.normal(size=(6, 8))) for _ in range(50)) == 1.0


def test_resampled_means_draw_the_same_seeds_everywhere() -> None:
    tables = np.random.default_rng(5).normal(size=(2, 3, 8))
    tables[1, 2] = tables[0, 0]
    draws = resampled_means(tables, seed=0, replicates=4000)
    assert draws.shape == (2, 4000, 3)
    np.testing.assert_allclose(draws[1, :, 2], draws[0, :, 0], rtol=1e-12)
    error = 4 * tables.std(axis=2).max() / np.sqrt(8 * 4000)
    np.testing.assert_allclose(draws.mean(axis=1), tables.mean(axis=2), atol=error)
    np.testing.assert_allclose(draws.var(axis=1), tables.var(axis=2) / 8, rtol=0.1)
    assert (resampled_means(np.full((1, 2, 8), 0.25), seed=0, replicates=50) == 0.25).all()


@pytest.mark.parametrize("n", [6, 8, 16])
def test_expanded_interval_of_a_mean_is_as_long_as_students(n: int) -> None:
    values = stats.norm.ppf((np.arange(n) + 0.5) / n)
    draws = resampled_means(values[None, None, :], seed=1, replicates=40000)[0, :, 0]
    interval = expanded_interval(0.0, draws, n)
    assert interval is not None
    low, high = stats.t.interval(0.95, n - 1, 0, stats.sem(values))
    assert interval == pytest.approx((low, high), rel=0.08)


def test_expanded_interval_holds_the_value_and_needs_defined_draws() -> None:
    draws = np.linspace(0, 1, 1000)
    assert expanded_interval(2.0, draws, 8) == (pytest.approx(0, abs=0.01), 2.0)
    draws[:11] = np.nan
    assert expanded_interval(0.5, draws, 8) is None
    draws[:5] = 0.5
    assert expanded_interval(0.5, draws, 8) is not None


def tables_of(reward: Array, ess: Array, mean_abs: Array, noise: float, rng: np.random.Generator) -> Array:
    """Tables of 8 seeds; a seed moves all arms alike as well as one by one."""
    shape = (len(reward), 8)
    measured = [dose[:, None] * np.exp(rng.normal(0, 0.05, shape)) for dose in (ess, mean_abs)]
    return np.stack([*measured, reward[:, None] + rng.normal(0, noise, shape) + rng.normal(0, noise, 8)])


def test_correlation_without_any_effect() -> None:
    """The interval excludes 0 in at most 5 % of sweeps."""
    rng, zero = np.random.default_rng(6), np.zeros(8)
    dose = np.geomspace(1, 0.05, 8)
    wrong = []
    for _ in range(300):
        tables = tables_of(zero, dose, dose, 0.1, rng)
        draws = resampled_means(tables, seed=0, replicates=400)
        value = float(rank_correlation(tables[:1].mean(axis=2), tables[2:].mean(axis=2))[0])
        interval = expanded_interval(value, rank_correlation(draws[0], draws[2]), 8)
        assert interval is not None
        wrong.append(not interval[0] <= 0 <= interval[1])
    assert np.mean(wrong) <= 0.05


def dosed(
    index: int, tables: Array, structure: str = "noise", seeds: Sequence[int] | None = None, collapse_below: float = 0.3
) -> DosedArm:
    """Arm `index` of tables `[3, A, S]`."""
    ess, mean_abs, reward = tables[:, index]
    names = range(len(ess)) if seeds is None else seeds
    runs = tuple(Run(seed, float(r), bool(r < collapse_below)) for seed, r in zip(names, reward, strict=True))
    return DosedArm(Arm(f"arm {index}", runs), structure, tuple(ess.tolist()), tuple(mean_abs.tolist()))


def sweep(decides: str, noise: float = 0.02, seed: int = 0, n_arms: int = 10) -> list[DosedArm]:
    """Two structures that take turns down a ladder of one dose, and differ in the other dose at the same reward."""
    rng = np.random.default_rng(seed)
    ladder = np.linspace(0.1, 3, n_arms)
    other = ladder + np.where(np.arange(n_arms) % 2, 0.8, -0.8)
    of_ess, of_abs = (ladder, other) if decides == "ess_seq" else (other, ladder)
    tables = tables_of(0.9 - 0.25 * ladder, 0.3 * np.exp(-of_ess), 0.01 * np.exp(of_abs), noise, rng)
    return [dosed(k, tables, ("noise", "bfloat16")[k % 2]) for k in range(n_arms)]


@pytest.mark.parametrize("decides", ["ess_seq", "mean_abs_logprob_diff"])
def test_the_dose_that_decides_is_found(decides: str) -> None:
    response = dose_response(sweep(decides), replicates=500)
    links = {link.dose: link for link in response.links}
    assert response.better == decides
    assert (response.n_arms, response.n_seeds) == (10, 8)
    sign = {"ess_seq": 1, "mean_abs_logprob_diff": -1}
    for dose, link in links.items():
        assert link.reward.value is not None
        assert link.left_over.value is not None
        assert link.collapse.value is not None
        assert sign[dose] * link.reward.value > 0.5
        assert sign[dose] * link.collapse.value < 0
        assert (abs(link.reward.value) > 0.95) == (dose == decides)
        assert (link.left_over.value < 0.01) == (dose == decides)
    assert response.seed_share.value is not None
    assert response.seed_share.value < 0.01


@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_doses_that_are_equally_good(slope: float) -> None:
    """Both swap three neighbours of an even ladder, or reward is noise: 5 % of sweeps name a dose (60, ± .028)."""
    rng = np.random.default_rng(8)
    ladder = np.linspace(0.1, 3, 7)
    shift = np.where(np.arange(7) % 2, 0.4, -0.4)
    named = 0
    for _ in range(60):
        tables = tables_of(0.9 - slope * ladder, 0.3 * np.exp(-ladder - shift), 0.01 * np.exp(ladder - shift), 0.1, rng)
        ess, mean_abs, reward = np.concatenate(
            [tables.mean(axis=2)[:, None], resampled_means(tables, seed=0, replicates=200)], axis=1
        )
        difference = left_over(ess, reward, rising=True) - left_over(mean_abs, reward, rising=False)
        interval = expanded_interval(difference[0], difference[1:], 8)
        assert interval is not None
        named += not interval[0] <= 0 <= interval[1]
    assert named / 60 <= 0.05 + 2 * 0.028


def test_order_of_arms_and_runs_does_not_matter() -> None:
    arms = sweep("ess_seq", noise=0.1)
    moved = []
    for each in arms[::-1]:
        order = np.random.default_rng(len(moved)).permutation(8)
        runs, ess, mean_abs = (
            tuple(values[k] for k in order) for values in (each.arm.runs, each.ess_seq, each.mean_abs_logprob_diff)
        )
        moved.append(DosedArm(Arm(each.arm.name, runs), each.structure, ess, mean_abs))
    here, there = (dose_response(which, worst=-9, replicates=300) for which in (arms, moved))
    for link, other in zip(here.links, there.links, strict=True):
        for key in ("reward", "collapse", "left_over"):
            one, two = getattr(link, key), getattr(other, key)
            assert (one.value, one.ci_low, one.ci_high) == pytest.approx(
                (two.value, two.ci_low, two.ci_high), abs=1e-12
            )
    assert here.seed_share.value == pytest.approx(there.seed_share.value)
    assert len(here.matched) == len(there.matched)


def test_arms_of_unlike_structure_and_like_dose_are_compared() -> None:
    reward = np.array([0.9, 0.5, 0.9, 0.9, 0.3])
    ess = np.array([0.5, 0.55, 0.45, 0.2, 0.2])
    tables = tables_of(reward, ess, np.full(5, 0.01), 0.03, np.random.default_rng(2))
    tables[0] = ess[:, None]
    arms = [dosed(k, tables, structure) for k, structure in enumerate(["a", "b", "a", "a", "b"])]
    response = dose_response(arms, tolerance=0.15, replicates=200)
    pairs = [(pair.comparison.first, pair.comparison.second) for pair in response.matched]
    assert pairs == [("arm 0", "arm 1"), ("arm 3", "arm 4")]  # .55 against .45 is beyond 15 %, 0 and 2 are of one kind
    assert response.matched[0].structures == ("a", "b")
    assert response.matched[0].ess_seq == pytest.approx((0.5, 0.55))
    expected = compare_sweep([(arms[0].arm, arms[1].arm), (arms[3].arm, arms[4].arm)])
    assert [pair.comparison for pair in response.matched] == expected
    assert (len(response.tested), response.ess_alone) == (2, "refuted")
    assert [pair.against_the_dose for pair in response.matched] == [True, True]
    wider = dose_response(arms, tolerance=0.25, replicates=200)
    assert len(wider.matched) == 3


def sweep_of(draw: np.random.Generator, apart: float) -> DoseResponse:
    """6 arms of 8 seeds whose reward falls with the ESS below .8; every other one is worse by `apart`."""
    arms = []
    for index, ess in enumerate(np.sort(draw.uniform(0.2, 1.0, 6))):
        seen = np.minimum(1.0, ess * np.exp(draw.normal(0, 0.03, 8)))
        reward = 0.9 - np.maximum(0.0, 0.8 - seen) + draw.normal(0, 0.03, 8) - apart * (index % 2)
        runs = tuple(Run(seed, float(value), False) for seed, value in enumerate(reward))
        structure = ("bfloat16", "logit noise")[index % 2]
        arms.append(DosedArm(Arm(f"arm {index}", runs), structure, tuple(seen), tuple(-np.log(seen))))
    return dose_response(arms, worst=-5.0, replicates=20)


def test_arms_that_follow_their_ess_are_no_contradiction() -> None:
    """Matched arms differ in ESS by up to a fifth, so that their rewards differ where ESS alone decides, too."""
    draw = np.random.default_rng(0)
    alone = [sweep_of(draw, 0.0) for _ in range(60)]
    assert sum(any(pair.comparison.reward.differs for pair in found.matched) for found in alone) > 15
    assert sum(found.ess_alone == "refuted" for found in alone) <= 3
    assert any(found.ess_alone == "ordered" for found in alone)
    assert sum(sweep_of(draw, 0.15).ess_alone == "refuted" for _ in range(30)) >= 24


def test_matched_arms_that_end_alike() -> None:
    tables = tables_of(
        np.array([0.8, 0.8]), np.array([0.4, 0.4]), np.array([0.01, 0.03]), 0.05, np.random.default_rng(0)
    )
    response = dose_response([dosed(0, tables, "a"), dosed(1, tables, "b")])
    assert response.matched[0].comparison.reward.detectable is not None
    assert (response.ess_alone, response.difference.why) == ("no-difference", "2 arms are too few: 5 are needed")
    assert response.detectable == response.matched[0].comparison.reward.detectable
    same = dose_response([dosed(0, tables, "a"), dosed(0, tables, "b")])
    assert (same.ess_alone, same.detectable) == ("no-difference", None)
    assert dose_response([]).ess_alone == "no-pairs"


def test_the_largest_detectable_difference_of_matched_arms_is_named() -> None:
    rng = np.random.default_rng(3)
    tables = tables_of(np.full(3, 0.8), np.full(3, 0.4), np.full(3, 0.01), 0.05, rng)
    tables[2, 2] = 0.8 + rng.normal(0, 0.2, 8)
    response = dose_response([dosed(k, tables, "abc"[k]) for k in range(3)], tolerance=0.5)
    detectable = [pair.comparison.reward.detectable for pair in response.matched]
    assert len(set(detectable)) == 3
    assert response.detectable == max(d for d in detectable if d)


def nothing(response: DoseResponse) -> bool:
    values = [value for link in response.links for value in (link.reward, link.collapse, link.left_over)]
    return all(v.value is None and v.why for v in [*values, response.seed_share, response.difference])


def test_where_nothing_can_be_told() -> None:
    assert nothing(dose_response(sweep("ess_seq", n_arms=4)))
    assert nothing(dose_response([]))
    tables = tables_of(
        np.linspace(0.9, 0.2, 5), np.geomspace(1, 0.1, 5) * 0.8, np.geomspace(1, 9, 5), 0.01, np.random.default_rng(1)
    )
    apart = dose_response([dosed(k, tables, "ab"[k % 2], range(8 * k, 8 * k + 8)) for k in range(5)], tolerance=1)
    assert nothing(apart)
    assert apart.difference.why == "no seed is in all arms"
    assert apart.ess_alone == "untested"
    alike = dose_response([dosed(k, np.full_like(tables, 0.5)) for k in range(5)], replicates=50)
    assert nothing(alike)
    assert "all arms have the same" in alike.difference.why


def test_few_seeds_have_values_but_no_intervals() -> None:
    arms = sweep("ess_seq")
    few = [
        DosedArm(Arm(d.arm.name, d.arm.runs[:5]), d.structure, d.ess_seq[:5], d.mean_abs_logprob_diff[:5]) for d in arms
    ]
    response = dose_response([*few[:-1], arms[-1]])
    assert response.n_seeds == 5
    assert response.links[0].reward.value is not None
    assert response.links[0].reward.ci_low is None
    assert response.links[0].reward.why == "no interval: all arms share 5 of the 6 seeds that it takes"
    assert response.better is None
    one = [
        DosedArm(Arm(d.arm.name, d.arm.runs[:1]), d.structure, d.ess_seq[:1], d.mean_abs_logprob_diff[:1]) for d in arms
    ]
    assert "one seed alone" in dose_response(one).seed_share.why


@pytest.mark.parametrize(
    ("ess", "mean_abs", "what"),
    [
        ((0.5,), (0.1, 0.2), "not one dose per run"),
        ((0.0, 0.5), (0.1, 0.2), "out of range"),
        ((0.5, 1.1), (0.1, 0.2), "out of range"),
        ((0.5, np.nan), (0.1, 0.2), "out of range"),
        ((0.5, 1.0), (-0.1, 0.2), "out of range"),
        ((0.5, 1.0), (0.1, np.inf), "out of range"),
    ],
)
def test_doses_that_are_none(ess: Any, mean_abs: Any, what: str) -> None:
    arm = Arm("x", (Run(0, 0.5, False), Run(1, 0.6, False)))
    with pytest.raises(UsageError, match=what):
        DosedArm(arm, "noise", ess, mean_abs)
