"""Which measure of the mismatch says best what becomes of an RL run: the effective sample size or mean |d|?

Two questions over the arms of a sweep. Does the final reward follow the dose at all (rank correlation)? And if it does,
does it follow one dose only: what is left of the differences between arms once a monotone curve of the dose is taken
off, and do arms of unlike structure that got the same dose end alike?

A dose has to be measured before the outcome can act on it, e.g. at the first steps: a run that collapses for any other
reason has a low ESS afterwards.

Arms are the fixed settings of a sweep, so intervals resample the seeds, the same ones in every arm: percentile
intervals, expanded for few seeds (Hesterberg 2015, section 5.3). They say what other seeds would have given. Noise
between seeds disorders arms that differ little, which pulls every rank correlation towards 0, and no interval makes up
for that: it does not cover the correlation of arms without noise. Where the dose does nothing it excludes 0 in 2 to 4 %
of sweeps (simulated, 5 to 12 arms, 5 to 12 seeds).

Shape legend: `A` arms, `S` seeds that all arms have, `R` replicates, `K` tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.arms import Arm, ArmComparison, compare_sweep
from mismatch_probe.metrics.inference import Floats, Interval, student
from mismatch_probe.metrics.intervals import BOOTSTRAP_PROMPTS
from mismatch_probe.types import MetricValue

_USABLE_SHARE = 0.99
Dose = Literal["ess_seq", "mean_abs_logprob_diff"]
EssAlone = Literal["no-pairs", "untested", "refuted", "ordered", "no-difference"]
MIN_ARMS = 5
# Fewer seeds give too few distinct replicates, as fewer prompts do.
MIN_SEEDS = BOOTSTRAP_PROMPTS
# Arms got the same dose where the larger ESS is at most so much larger.
TOLERANCE = 0.2
_UNSTABLE = "no interval: too many draws of seeds in which all arms are alike"
_EQUAL = "all arms have the same reward, share of collapses or dose"


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


@dataclass(frozen=True)
class DosedArm:
    """An arm and the mismatch that its runs were given.

    Attributes:
        arm: Its runs; their reward is the sampled policy's or that of the clean weights, as the question is.
        structure: What kind of mismatch it is, e.g. `"bfloat16"` or `"logit noise"`.
        ess_seq: Of each run, in the order of `arm.runs`, in (0, 1].
        mean_abs_logprob_diff: The same, in nats.
    """

    arm: Arm
    structure: str
    ess_seq: tuple[float, ...]
    mean_abs_logprob_diff: tuple[float, ...]

    def __post_init__(self) -> None:
        ess, mean_abs = np.array(self.ess_seq), np.array(self.mean_abs_logprob_diff)
        if not len(self.arm.runs) == len(ess) == len(mean_abs) > 0:
            raise UsageError(
                f"The arm {self.arm.name} has not one dose per run.", "Give one value of each for every run."
            )
        if not ((ess > 0) & (ess <= 1)).all() or not ((mean_abs >= 0) & np.isfinite(mean_abs)).all():
            raise UsageError(
                f"A dose of the arm {self.arm.name} is out of range.",
                "Give an ESS in (0, 1] and a finite mean |d| that is not negative.",
            )


@dataclass(frozen=True)
class DoseLink:
    """How the outcome of arms follows one dose.

    Attributes:
        dose: Which.
        reward: Spearman's rank correlation over arms of mean reward with mean dose.
        collapse: The same of the share of runs that collapsed.
        left_over: Share of the variance of mean reward between arms that is left around the best monotone curve,
            rising with ESS and falling with mean |d|. In sample: the curve takes up part of the noise, too.
    """

    dose: Dose
    reward: MetricValue
    collapse: MetricValue
    left_over: MetricValue


@dataclass(frozen=True)
class MatchedArms:
    """Two arms of unlike structure whose ESS agree.

    Attributes:
        structures: Of the two.
        ess_seq: Means over their runs.
        mean_abs_logprob_diff: The same.
        comparison: Of the two arms, adjusted over all matched ones.
    """

    structures: tuple[str, str]
    ess_seq: tuple[float, float]
    mean_abs_logprob_diff: tuple[float, float]
    comparison: ArmComparison

    @property
    def against_the_dose(self) -> bool:
        """Whether the arm of higher ESS ends lower, by more than chance.

        The doses of matched arms differ by up to `TOLERANCE`, and where reward depends on ESS that alone makes the arm
        of higher ESS end higher: taken as a contradiction, it was one in 19 % of 6-arm sweeps that ESS alone decided.
        """
        difference = self.comparison.difference.value
        if difference is None or not self.comparison.reward.differs:
            return False
        return difference * (self.ess_seq[0] - self.ess_seq[1]) <= 0


@dataclass(frozen=True)
class DoseResponse:
    """The arms of a sweep by dose.

    Attributes:
        n_arms: How many.
        n_seeds: Seeds that all of them have; only these are used, except in `matched`.
        links: One of `ess_seq` and one of `mean_abs_logprob_diff`.
        seed_share: Share of the variance of mean reward between arms that the seeds alone would give: about what a
            dose that decides everything would leave, less what the curve takes up.
        difference: What ESS leaves less what mean |d| leaves; negative where ESS is the better dose.
        matched: Arms of unlike structure whose ESS agree.
    """

    n_arms: int
    n_seeds: int
    links: tuple[DoseLink, DoseLink]
    seed_share: MetricValue
    difference: MetricValue
    matched: tuple[MatchedArms, ...]

    @property
    def better(self) -> Dose | None:
        """The dose that leaves less, where the interval of `difference` excludes 0.

        Of two doses that misorder as many arms one is named in 4 to 6 % of sweeps (simulated, 5 to 13 arms, 8 seeds).
        """
        low, high = self.difference.ci_low, self.difference.ci_high
        if low is None or high is None or low <= 0 <= high:
            return None
        return "ess_seq" if high < 0 else "mean_abs_logprob_diff"

    @property
    def tested(self) -> tuple[MatchedArms, ...]:
        """Matched arms with enough seeds for a test of reward."""
        return tuple(pair for pair in self.matched if pair.comparison.reward.differs is not None)

    @property
    def ess_alone(self) -> EssAlone:
        """Whether ESS alone decides the reward, asked of matched arms.

        `refuted`: an arm of higher ESS ends lower. `ordered`: matched arms differ in the order of their ESS, which may
        be why. `no-difference`: no test shows one.
        """
        if not self.matched:
            return "no-pairs"
        if not self.tested:
            return "untested"
        if any(pair.against_the_dose for pair in self.matched):
            return "refuted"
        return "ordered" if any(pair.comparison.reward.differs for pair in self.tested) else "no-difference"

    @property
    def detectable(self) -> float | None:
        """The largest of the detectable differences of the tested pairs; None where one of them has none."""
        found = [pair.comparison.reward.detectable for pair in self.tested]
        known = [value for value in found if value is not None]
        return max(known) if known and len(known) == len(found) else None


def dose_response(
    arms: Sequence[DosedArm],
    *,
    worst: float = 0.0,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    replicates: int = 2000,
) -> DoseResponse:
    """Relates the mean reward of arms, and their collapses, to either dose.

    Args:
        arms: All arms, the clean one included. Below `MIN_ARMS` only matched arms are compared.
        worst: What a run that diverged counts as, see `arms.compare_sweep`.
        tolerance: By which share of the smaller one the ESS of matched arms may differ. Within it the dose itself can
            still differ: `matched` has the values.
        seed: Seed of the bootstrap.
        replicates: Bootstrap replicates.

    Raises:
        UsageError: A run has less than the worst reward.
    """
    seeds = [{run.seed for run in dosed.arm.runs} for dosed in arms]
    shared = sorted(set.intersection(*seeds)) if seeds else []
    why = "" if shared else "no seed is in all arms"
    if len(arms) < MIN_ARMS:
        why = f"{len(arms)} arms are too few: {MIN_ARMS} are needed"
    if why:
        links, share, difference = _inconclusive(why)
    else:
        tables = np.stack([_table(dosed, shared, worst) for dosed in arms], axis=1)
        links, share, difference = _judged(tables, seed, replicates)
    return DoseResponse(len(arms), len(shared), links, share, difference, _matched(arms, worst, tolerance))


def _table(dosed: DosedArm, seeds: Sequence[int], worst: float) -> Floats:
    """`[4, S]`: the two doses, reward and whether the run collapsed."""
    rewards = dosed.arm.rewards(worst)
    rows = {
        run.seed: (ess, mean_abs, rewards[run.seed], float(run.collapsed))
        for run, ess, mean_abs in zip(dosed.arm.runs, dosed.ess_seq, dosed.mean_abs_logprob_diff, strict=True)
    }
    return np.array([rows[seed] for seed in seeds]).T


def _judged(tables: Floats, seed: int, replicates: int) -> tuple[tuple[DoseLink, DoseLink], MetricValue, MetricValue]:
    """Links, what seeds alone leave, and the difference, of tables `[4, A, S]`."""
    n_seeds = tables.shape[2]
    draws = resampled_means(tables, seed=seed, replicates=replicates)
    ess, mean_abs, reward, collapsed = np.concatenate([tables.mean(axis=2)[:, None], draws], axis=1)
    left = left_over(ess, reward, rising=True), left_over(mean_abs, reward, rising=False)

    def value(found: Floats) -> MetricValue:
        """Of `[1 + R]`: the data, then the replicates."""
        if not np.isfinite(found[0]):
            return MetricValue(None, why=_EQUAL)
        if n_seeds < MIN_SEEDS:
            why = f"no interval: all arms share {n_seeds} of the {MIN_SEEDS} seeds that it takes"
            return MetricValue(float(found[0]), why=why)
        interval = expanded_interval(float(found[0]), found[1:], n_seeds)
        low, high = interval or (None, None)
        return MetricValue(float(found[0]), low, high, "" if interval else _UNSTABLE)

    def link(dose: Dose, values: Floats, left: Floats) -> DoseLink:
        correlations = value(rank_correlation(values, reward)), value(rank_correlation(values, collapsed))
        return DoseLink(dose, *correlations, value(left))

    links = link("ess_seq", ess, left[0]), link("mean_abs_logprob_diff", mean_abs, left[1])
    return links, _seed_share(tables[2]), value(left[0] - left[1])


def _seed_share(rewards: Floats) -> MetricValue:
    if rewards.shape[1] < 2:
        return MetricValue(None, why="one seed alone says nothing about the spread between seeds")
    if np.ptp(rewards.mean(axis=1)) == 0:
        return MetricValue(None, why=_EQUAL)
    return MetricValue(seed_share(rewards), why="no interval: an estimate of noise")


def _inconclusive(why: str) -> tuple[tuple[DoseLink, DoseLink], MetricValue, MetricValue]:
    none = MetricValue(None, why=why)
    links = DoseLink("ess_seq", none, none, none), DoseLink("mean_abs_logprob_diff", none, none, none)
    return links, none, none


def _matched(arms: Sequence[DosedArm], worst: float, tolerance: float) -> tuple[MatchedArms, ...]:
    def alike(one: DosedArm, other: DosedArm) -> bool:
        low, high = sorted(float(np.mean(dosed.ess_seq)) for dosed in (one, other))
        return one.structure != other.structure and high <= (1 + tolerance) * low

    pairs = [(one, other) for one, other in combinations(arms, 2) if alike(one, other)]
    comparisons = compare_sweep([(one.arm, other.arm) for one, other in pairs], worst=worst)
    return tuple(
        MatchedArms(
            structures=(one.structure, other.structure),
            ess_seq=(float(np.mean(one.ess_seq)), float(np.mean(other.ess_seq))),
            mean_abs_logprob_diff=(
                float(np.mean(one.mean_abs_logprob_diff)),
                float(np.mean(other.mean_abs_logprob_diff)),
            ),
            comparison=comparison,
        )
        for (one, other), comparison in zip(pairs, comparisons, strict=True)
    )
