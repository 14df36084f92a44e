"""The finite part of a pair, as tokens and as sequences.

Shape legend: `N` tokens, `S` sequences, `P` prompts, `K` columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.intervals import Estimate, Floats, Working
from mismatch_probe.types import MetricValue, PairArrays

Ints = NDArray[np.int64]


def group_sums(group: Ints, values: Floats, n_groups: int) -> Floats:
    """`[n_groups]` float64 sums of `values` `[n]` by `group` `[n]`."""
    return np.bincount(group, weights=values, minlength=n_groups).astype(np.float64, copy=False)


@dataclass(frozen=True)
class _Rows:
    """Rows that belong to prompts.

    Attributes:
        prompt: `[n]` prompt of each row.
        n_prompts: P of the pair, prompts without rows included, so that prompts of two pairs can be matched.
    """

    prompt: Ints
    n_prompts: int

    def __len__(self) -> int:
        return len(self.prompt)

    def per_prompt(self, values: Floats) -> Floats:
        return group_sums(self.prompt, values, self.n_prompts)

    @cached_property
    def rows_per_prompt(self) -> Floats:
        return np.bincount(self.prompt, minlength=self.n_prompts).astype(np.float64)

    def estimate(
        self,
        columns: Sequence[Floats],
        working: Working,
        metric: Callable[[float], float],
        *,
        weight: Floats | None = None,
        why: str = "",
    ) -> Estimate:
        """An estimate over the (weighted) means of `columns`, K arrays `[n]`."""
        counts = self.rows_per_prompt if weight is None else self.per_prompt(weight)
        sums = [self.per_prompt(column if weight is None else column * weight) for column in columns]
        return Estimate(np.stack(sums, axis=1), np.stack([counts] * len(sums), axis=1), working, metric, why)

    def mean(self, values: Floats) -> Estimate:
        """The mean of non-negative values `[n]`, with its interval on the log scale."""
        return self.estimate([values], scales.log_mean, scales.exp)

    def mean_where(self, values: Floats, where: NDArray[np.bool_]) -> Estimate:
        """The same over the rows where `where` `[n]` holds."""
        return self.estimate([values], scales.log_mean, scales.exp, weight=where.astype(np.float64))

    def mean_exp(
        self, x: Floats, metric: Callable[[float], float], *, weight: Floats | None = None, why: str = ""
    ) -> Estimate:
        """`metric` of log mean exp(x), never overflowing on the way."""
        shift = scales.shift_of(x)
        columns = [scales.shifted_expm1(x, shift)]
        return self.estimate(columns, scales.log_mean_exp(shift), metric, weight=weight, why=why)

    def ess(self, log_weight: Floats, *, weight: Floats | None = None, why: str = "") -> Estimate:
        """(Σw)² / (n Σw²), w = exp(log_weight), the sums weighted by `weight`: a fraction of n."""
        shift = scales.shift_of(log_weight)
        excess = scales.shifted_expm1(log_weight, shift)
        y = scales.centred(excess)
        working = scales.log_squared_variation(math.exp(-shift) + float(excess.mean()))
        metric = scales.ess_of_log_squared_variation
        return self.estimate([y, y**2], working, metric, weight=weight, why=why)

    def variance(self, x: Floats, power: float, metric: Callable[[float], float]) -> Estimate | MetricValue:
        """`metric` of log(v^power), v the sample variance (n − 1) of `x`."""
        n = len(self)
        if n < 2:
            return MetricValue(None, why="needs at least 2 values")
        y = scales.centred(x)
        correction = math.log(n / (n - 1))
        return self.estimate([y, y**2], lambda means: power * (scales.log_variance(means) + correction), metric)


@dataclass(frozen=True)
class Tokens(_Rows):
    """Tokens that are finite on both sides: `rollout_logprob` and `trainer_logprob` `[N]`, nats; `position` `[N]`."""

    rollout_logprob: Floats
    trainer_logprob: Floats
    position: Ints

    @cached_property
    def log_ratio(self) -> Floats:
        return self.trainer_logprob - self.rollout_logprob

    @cached_property
    def abs_log_ratio(self) -> Floats:
        return np.abs(self.log_ratio)

    @cached_property
    def prob_diff(self) -> Floats:
        """e^a − e^b, from the larger side and expm1, so that it keeps its digits when a is close to b."""
        larger = np.maximum(self.trainer_logprob, self.rollout_logprob)
        return np.asarray(-np.sign(self.log_ratio) * np.exp(larger) * np.expm1(-self.abs_log_ratio))

    @cached_property
    def abs_prob_diff(self) -> Floats:
        return np.abs(self.prob_diff)


@dataclass(frozen=True)
class Sequences(_Rows):
    """Sequences that have tokens, all of them finite.

    Attributes:
        seq_log_ratio: `[S]` D_i = Σ_t d_t, nats.
        length: `[S]` T_i, tokens, as float64.
        token_abs_log_ratio: `[N]` |d| of their tokens.
        token_sequence: `[N]` row of each of these tokens in this object, 0 … S−1.
    """

    seq_log_ratio: Floats
    length: Floats
    token_abs_log_ratio: Floats
    token_sequence: Ints


def _finite(pair: PairArrays) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(pair.rollout_logprob) & np.isfinite(pair.trainer_logprob))


def _n_prompts(pair: PairArrays) -> int:
    return max(len(pair.prompt_ids), int(pair.prompt.max(initial=-1)) + 1)


def count_nonfinite(pair: PairArrays) -> int:
    """Tokens that are NaN or ±inf on either side."""
    return int(len(pair.sequence) - np.count_nonzero(_finite(pair)))


def count_sequences(pair: PairArrays) -> int:
    """Sequences that have at least one token."""
    return int(np.count_nonzero(np.bincount(pair.sequence, minlength=1)))


def finite_tokens(pair: PairArrays) -> Tokens:
    """The tokens of `pair` that are finite on both sides."""
    keep = _finite(pair)
    return Tokens(
        prompt=pair.prompt[pair.sequence[keep]],
        n_prompts=_n_prompts(pair),
        rollout_logprob=pair.rollout_logprob[keep].astype(np.float64),
        trainer_logprob=pair.trainer_logprob[keep].astype(np.float64),
        position=pair.position[keep],
    )


def finite_sequences(pair: PairArrays) -> Sequences:
    """The non-empty sequences of `pair` without any non-finite token."""
    n_sequences = len(pair.prompt)
    finite = _finite(pair)
    length = np.bincount(pair.sequence, minlength=n_sequences)
    whole = (length > 0) & (np.bincount(pair.sequence[finite], minlength=n_sequences) == length)
    keep = whole[pair.sequence]
    row = np.cumsum(whole) - 1
    token_sequence = row[pair.sequence[keep]]
    log_ratio = pair.trainer_logprob[keep].astype(np.float64) - pair.rollout_logprob[keep].astype(np.float64)
    return Sequences(
        prompt=pair.prompt[whole],
        n_prompts=_n_prompts(pair),
        seq_log_ratio=group_sums(token_sequence, log_ratio, int(whole.sum())),
        length=length[whole].astype(np.float64),
        token_abs_log_ratio=np.abs(log_ratio),
        token_sequence=token_sequence,
    )
