"""The usable part of a pair, as sums over tokens and as sequences, and how estimates are made from either.

Shape legend: `n` usable tokens, `S` sequences, `P` prompts, `K` columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.accumulate import PairSums, as_sums
from mismatch_probe.metrics.chunks import Ints, group_sums
from mismatch_probe.metrics.column import OfPart
from mismatch_probe.metrics.exact import ExactRows
from mismatch_probe.metrics.inference import Floats, Interval, Working, excess_kurtosis
from mismatch_probe.metrics.intervals import NO_INTERVAL, Estimate, kish, share_interval, with_interval
from mismatch_probe.metrics.sums import CentredSums, ShiftedSums
from mismatch_probe.types import MetricValue, PairArrays

LARGEST_LOGPROB = 150.0
# The share of weights beyond the cap of a winsorised mean.
WINSORISED = 0.001
PairTokens = PairArrays | PairSums

_FEW = MetricValue(None, why="needs at least 2 values")
# A spread over two prompts has no spread of its own: both are equally far from their mean.
SPREAD_PROMPTS = 3
# As many weights (half of all, if these are fewer), and such a share of all, must make the sum of their squares.
SQUARED_WEIGHTS = 30
SQUARED_SHARE = 0.2
# Excess kurtosis of the log weights up to which they count as normal (two of a hundred samples of 256 normal ones have
# more), and the variance below which the ESS is 1 minus that variance, whatever their tails.
LIGHT_TAILS = 1.0
_SOME_VARIANCE = 0.01
_KURTOSIS_VALUES = 8


class Tokens:
    """The usable tokens of a pair.

    Attributes:
        pair: The pair.
        sums: Per-prompt sums `[P]` over its usable tokens.
    """

    def __init__(self, pair: PairSums) -> None:
        self.pair, self.sums = pair, pair.tokens

    def __len__(self) -> int:
        return self.pair.n_usable

    @cached_property
    def log_ratio_cuts(self) -> tuple[float, float, float]:
        """Quantiles of d, nats: of `WINSORISED` below, the median, and of `WINSORISED` above."""
        low, middle, high = self.log_ratio_quantiles(WINSORISED, 0.5, 1 - WINSORISED)
        return low, middle, high

    def log_ratio_quantiles(self, *levels: float) -> list[float]:
        """Quantiles of d, nats, between neighbours in proportion."""
        n = len(self)
        places = [level * (n - 1) for level in levels]
        below = [min(int(place), n - 2) if n > 1 else 0 for place in places]
        both = np.array([(first, min(first + 1, n - 1)) for first in below], np.int64)
        ends = self.pair.log_ratio.ranked(both.ravel())[0].reshape(both.shape)
        return [
            float(np.interp(place, (first, first + 1), pair))
            for place, first, pair in zip(places, below, ends, strict=True)
        ]

    def per_prompt(self, of: OfPart) -> Floats:
        """`[P]` sums of what `of` makes of d; it is given the tokens in parts."""
        sequences = self.pair.sequences
        sums = self.pair.log_ratio.run_sums(of, sequences.n_usable)
        return group_sums(sequences.prompt, sums, self.pair.n_prompts)

    def with_limits(self, key: str, value: float, interval: Interval | None) -> MetricValue:
        """A `MetricValue` of metric `key`, marked where these prompts do not calibrate its interval."""
        if interval is None:
            return MetricValue(value, why=NO_INTERVAL)
        counts = self.sums.counts
        return with_interval(value, interval, int(np.count_nonzero(counts)), key=key, effective=kish(counts))

    def share(self, key: str, hits: Floats) -> MetricValue:
        """Metric `key`, the share of tokens of which each prompt has `hits` `[P]`."""
        interval = share_interval(hits, self.sums.counts, heavy_tailed=True)
        return self.with_limits(key, float(hits.sum() / len(self)), interval)

    def estimate(
        self,
        sums: Sequence[Floats],
        working: Working,
        metric: Callable[[float], float],
        *,
        counts: Floats | None = None,
        why: str = "",
        least_prompts: int = 2,
    ) -> Estimate:
        """An estimate over the means that belong to `sums`, K arrays `[P]`, of all tokens or of `counts` `[P]`."""
        counts = np.stack([self.sums.counts if counts is None else counts] * len(sums), axis=1)
        return Estimate(np.stack(sums, axis=1), counts, working, metric, why, least_prompts)

    def mean(self, sums: Floats) -> Estimate:
        """The mean of non-negative values with sums `[P]`, with its interval on the log scale."""
        return self.estimate([sums], scales.log_mean, scales.exp)

    def mean_exp(self, of: OfPart) -> Estimate:
        """Mean exp(x), x what `of` makes of d; its digits are kept near 1 and near 0."""
        largest = np.array([self.pair.log_ratio.largest(of)])
        if scales.deep(largest):
            shift = float(largest[0])
            sums = self.per_prompt(lambda d: np.exp(of(d) - shift))
            return self.estimate([sums], scales.log_shifted_mean(shift), scales.exp)
        shift = scales.shift_of(largest)
        sums = self.per_prompt(lambda d: scales.shifted_expm1(of(d), shift))
        return self.estimate([sums], scales.log_mean_exp(shift), scales.exp)

    def mean_power(
        self, power: float, excess: ShiftedSums, metric: Callable[[float], float], *, column: int = 0
    ) -> Estimate:
        """`metric` of log mean ρ^`power`, from the sums of ρ^`power` − 1."""
        if (weights := self._deep) is not None:
            return weights.mean_exp(power * weights.log_weight, metric)
        return self.estimate([excess.sums[:, column]], scales.log_mean_exp(excess.shift), metric)

    def ess(self) -> Estimate:
        """(Σρ)² / (n Σρ²), a fraction of n."""
        if (weights := self._deep) is not None:
            return weights.ess(weights.log_weight)
        excess, shift = self.sums.ratio_excess, self.sums.ratio.shift
        working = scales.log_squared_variation(math.exp(-shift) + float(excess.centre[0]))
        sums = excess.of((0,), (0, 0))
        return self.estimate(sums, working, scales.ess_of_log_squared_variation, least_prompts=SPREAD_PROMPTS)

    def variance(self, x: CentredSums, power: float, metric: Callable[[float], float]) -> Estimate | MetricValue:
        """`metric` of log(v^power), v the sample variance (n − 1)."""
        if len(self) < 2:
            return _FEW
        working = _variance(len(self), power)
        return self.estimate(x.of((0,), (0, 0)), working, metric, least_prompts=SPREAD_PROMPTS)

    @property
    def _deep(self) -> _DeepRatios | None:
        """The ratios themselves where all are far below 1, so that the sums of ρ − 1 have lost them."""
        if self.sums.log_ratio.sum() != -self.sums.abs_log_ratio.sum():
            return None
        if not scales.deep(np.array([-self.sums.ranges["abs_log_ratio"].low])):
            return None
        prompt = np.repeat(self.pair.sequences.prompt, self.pair.sequences.n_usable)
        return _DeepRatios(prompt, self.pair.n_prompts, self.pair.log_ratio.whole())


@dataclass(frozen=True)
class _Rows:
    """Rows of which each belongs to a prompt.

    Attributes:
        prompt: `[S]` prompt of each.
        n_prompts: P of the pair, prompts without rows included, so that prompts of two pairs can be matched.
    """

    prompt: Ints
    n_prompts: int

    def __len__(self) -> int:
        return len(self.prompt)

    def per_prompt(self, values: Floats) -> Floats:
        """`[P]` sums of `values` `[S]`."""
        return group_sums(self.prompt, values, self.n_prompts)

    def estimate(
        self,
        columns: Sequence[Floats],
        working: Working,
        metric: Callable[[float], float],
        *,
        weight: Floats | None = None,
        why: str = "",
        least_prompts: int = 2,
    ) -> Estimate:
        """An estimate over the (weighted) means of `columns`, K arrays `[S]`."""
        weights = np.ones(len(self)) if weight is None else weight
        counts = self.per_prompt(weights)
        sums = [self.per_prompt(column if weight is None else column * weight) for column in columns]
        stacked = np.stack(sums, axis=1), np.stack([counts] * len(sums), axis=1)
        return Estimate(*stacked, working, metric, why, least_prompts)

    def mean_exp(
        self, x: Floats, metric: Callable[[float], float], *, weight: Floats | None = None, why: str = ""
    ) -> Estimate:
        """`metric` of log mean exp(x), never overflowing on the way and never rounded away."""
        if scales.deep(x):
            shift = float(x.max())
            return self.estimate([np.exp(x - shift)], scales.log_shifted_mean(shift), metric, weight=weight, why=why)
        shift = scales.shift_of(x)
        columns = [scales.shifted_expm1(x, shift)]
        return self.estimate(columns, scales.log_mean_exp(shift), metric, weight=weight, why=why)

    def ess(self, log_weight: Floats, *, weight: Floats | None = None, why: str = "") -> Estimate:
        """(Σw)² / (S Σw²), w = exp(log_weight), the sums weighted by `weight`: a fraction of S."""
        if scales.deep(log_weight):
            log_weight = log_weight - log_weight.max()
        shift = scales.shift_of(log_weight)
        excess = scales.shifted_expm1(log_weight, shift)
        y = scales.centred(excess)
        working = scales.log_squared_variation(math.exp(-shift) + float(excess.mean()))
        metric = scales.ess_of_log_squared_variation
        return self.estimate([y, y**2], working, metric, weight=weight, why=why, least_prompts=SPREAD_PROMPTS)


@dataclass(frozen=True)
class _DeepRatios(_Rows):
    """Tokens whose ratios are all far below 1.

    Attributes:
        log_weight: `[n]` d, nats.
    """

    log_weight: Floats


@dataclass(frozen=True)
class Sequences(_Rows):
    """Sequences that have tokens, all of them usable.

    Attributes:
        seq_log_ratio: `[S]` D_i = Σ_t d_t, nats.
        length: `[S]` T_i, tokens, as float64.
        log_mult_error: log of the largest mean of exp|d| − 1 over a sequence.
        k3: `[S]` Σ_t k3(d_t), nats.
        max_token_kl: `[S]` largest KL of a token, nats.
        max_token_kl_exact: Whether that is the exact one, instead of k3.
        slope: `[S]` of a on b; NaN where a sequence has none.
    """

    seq_log_ratio: Floats
    length: Floats
    log_mult_error: float
    k3: Floats
    max_token_kl: Floats
    max_token_kl_exact: bool
    slope: Floats

    def variance(self, x: Floats, power: float, metric: Callable[[float], float]) -> Estimate | MetricValue:
        """`metric` of log(v^power), v the sample variance (S − 1) of `x`."""
        if len(self) < 2:
            return _FEW
        y = scales.centred(x)
        return self.estimate([y, y**2], _variance(len(self), power), metric, least_prompts=SPREAD_PROMPTS)


def few_decide(log_weight: Floats) -> str:
    """The mark of what a few of the weights exp(log_weight) `[S]` decide through Σ w², whatever the number of prompts.

    The ESS of the squared weights says how many make that sum, and the kurtosis of the log weights whether sequences
    that were not seen would add to it. Where neither marks, intervals of the ESS cover 90 to 100 %; of laws that the
    first marks they cover down to 0 (validation/ess_marks.py), of those that the second marks 67 to 98 %
    (validation/coverage.py).
    """
    effective, variance = kish(np.exp(2 * (log_weight - log_weight.max()))), float(log_weight.var())
    if effective < max(min(SQUARED_WEIGHTS, len(log_weight) / 2), SQUARED_SHARE * len(log_weight)):
        normal = math.exp(-variance)
        return f"uncalibrated, optimistic: {effective:.3g} weights decide it; exp(−Var log weight) is {normal:.3g}"
    if len(log_weight) < _KURTOSIS_VALUES or variance <= _SOME_VARIANCE:
        return ""
    tails = excess_kurtosis(log_weight)
    heavy = f"uncalibrated, optimistic: the log weights have heavy tails (excess kurtosis {tails:.2g})"
    return heavy if tails > LIGHT_TAILS else ""


def _variance(n: int, power: float) -> Working:
    """log(v^power) of a sample variance v, over the means of (y, y²)."""
    correction = math.log(n / (n - 1))
    return lambda means: power * (scales.log_variance(means) + correction)


def count_excluded(pair: PairTokens) -> int:
    """Tokens that are left out of every metric."""
    return as_sums(pair).excluded.n_tokens


def usable_tokens(pair: PairTokens) -> Tokens:
    """The usable tokens of `pair`."""
    return Tokens(as_sums(pair))


def usable_sequences(pair: PairTokens, exact: ExactRows | None = None) -> Sequences:
    """The non-empty sequences of `pair` without any unusable token, with what `exact` says of their tokens."""
    sums = as_sums(pair)
    every = sums.sequences
    whole = every.n_usable == every.length
    largest = None if exact is None else exact.largest_kl(every.index, every.length)
    return Sequences(
        prompt=every.prompt[whole],
        n_prompts=sums.n_prompts,
        seq_log_ratio=every.log_ratio[whole],
        length=every.length[whole].astype(np.float64),
        log_mult_error=sums.log_mult_error,
        k3=every.k3[whole],
        max_token_kl=(every.max_k3 if largest is None else largest)[whole],
        max_token_kl_exact=largest is not None,
        slope=every.slope[whole],
    )


def of_probabilities(metric: Callable[[Tokens], Estimate | MetricValue]) -> Callable[[Tokens], Estimate | MetricValue]:
    """`metric`, unless a broken engine's log-probs are so far above 0 that their exponentials cannot be squared."""

    def guarded(tokens: Tokens) -> Estimate | MetricValue:
        largest = max(tokens.sums.ranges[name].high for name in ("rollout_logprob", "trainer_logprob"))
        if largest > LARGEST_LOGPROB:
            return MetricValue(None, why=f"a log-prob is {largest:.4g}, so its probability overflows float64")
        return metric(tokens)

    return guarded
