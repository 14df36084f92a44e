"""Plot-ready tables: what figures draw, computed here so that they compute nothing.

Shape legend: `S` sequences, `K` bins or points. Only finite tokens and sequences count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mismatch_probe.metrics.intervals import Estimate, Floats, Interval, evaluate
from mismatch_probe.metrics.sample import Ints, Tokens, finite_sequences, finite_tokens
from mismatch_probe.metrics.sequence import intercept, slope_per_1k
from mismatch_probe.metrics.summary import off_policy_why
from mismatch_probe.types import MetricValue, PairArrays

PROBABILITY_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
_CCDF_POINTS = 400
_POSITION_BINS = 12
_FIRST_POSITIONS = 8
_SEED = 0
_REPLICATES = 1000


@dataclass(frozen=True)
class PolicyDensity:
    """Joint histogram of the two policies' probabilities of the sampled tokens.

    Attributes:
        edges: `[K+1]` edges over probability 0 … 1, shared by both axes.
        counts: `[K, K]` tokens with rollout probability exp(b) in bin i and trainer probability exp(a) in bin j.
        n: Tokens counted.
    """

    edges: Floats
    counts: Ints
    n: int


@dataclass(frozen=True)
class LengthCurve:
    """Sequence log ratio against length, with its least-squares line.

    Attributes:
        response_length: `[S]` tokens.
        seq_log_ratio: `[S]` D, nats.
        slope_per_1k: Nats per 1,000 tokens; None with `why`.
        intercept: Nats; None with `why`.
        slope_ci: 95 % interval of the slope.
        why: Why there is no line, or what limits it.
    """

    response_length: Ints
    seq_log_ratio: Floats
    slope_per_1k: float | None
    intercept: float | None
    slope_ci: Interval | None
    why: str


@dataclass(frozen=True)
class Ccdf:
    """The tail of |d|, for logarithmic axes: tokens with d = 0 are in the shares' denominator but are no point.

    Attributes:
        abs_diff: `[K]` |d|, nats, increasing.
        share: `[K]` share of all tokens with at least this |d|.
    """

    abs_diff: Floats
    share: Floats


@dataclass(frozen=True)
class BinnedDiff:
    """Mean |d| by a property of the token, empty bins left out.

    Attributes:
        left: `[K]` left edges, inclusive.
        right: `[K]` right edges, exclusive.
        n: `[K]` tokens.
        mean_abs: `[K]` mean |d|, nats.
        ci_low: `[K]` 95 % interval, prompt-clustered; NaN where a bin has fewer than 2 prompts.
        ci_high: `[K]`
    """

    left: Floats
    right: Floats
    n: Ints
    mean_abs: Floats
    ci_low: Floats
    ci_high: Floats


def policy_density(pair: PairArrays, bins: int = 50) -> PolicyDensity:
    """Joint histogram of exp(b) and exp(a) in `bins` equal bins per axis."""
    tokens = finite_tokens(pair)

    def index(logprob: Floats) -> Ints:
        cell: Ints = np.minimum((np.exp(np.minimum(logprob, 0.0)) * bins).astype(np.int64), bins - 1)
        return cell

    flat = index(tokens.rollout_logprob) * bins + index(tokens.trainer_logprob)
    counts = np.bincount(flat, minlength=bins * bins).reshape(bins, bins)
    return PolicyDensity(edges=np.linspace(0.0, 1.0, bins + 1), counts=counts, n=len(tokens))


def length_curve(pair: PairArrays) -> LengthCurve:
    """D against length with the line of `seq_log_ratio_slope_per_1k`; no line for an off-policy pair."""
    sequences = finite_sequences(pair)
    slope = line = MetricValue(None, why=off_policy_why(pair, "seq_log_ratio_slope_per_1k"))
    if not slope.why and len(sequences) == 0:
        slope = line = MetricValue(None, why="no finite sequences")
    elif not slope.why:
        results = {"slope": slope_per_1k(sequences), "intercept": intercept(sequences)}
        values = {key: result for key, result in results.items() if isinstance(result, MetricValue)}
        estimates = {key: result for key, result in results.items() if isinstance(result, Estimate)}
        values |= evaluate(estimates, seed=_SEED, replicates=_REPLICATES)
        slope, line = values["slope"], values["intercept"]
    return LengthCurve(
        response_length=sequences.length.astype(np.int64),
        seq_log_ratio=sequences.seq_log_ratio,
        slope_per_1k=slope.value,
        intercept=line.value,
        slope_ci=None if slope.ci_low is None or slope.ci_high is None else (slope.ci_low, slope.ci_high),
        why=slope.why,
    )


def abs_diff_ccdf(pair: PairArrays) -> Ccdf:
    """Tail of |d| at up to 400 of its quantiles, spaced evenly in the logarithm of the share."""
    values = finite_tokens(pair).abs_log_ratio
    positive = np.sort(values[values > 0])
    if len(positive) == 0:
        return Ccdf(np.empty(0), np.empty(0))
    ranks = np.unique(np.geomspace(1, len(positive), _CCDF_POINTS).round().astype(np.int64))
    points = np.unique(positive[len(positive) - ranks])
    at_least = len(positive) - np.searchsorted(positive, points, side="left")
    return Ccdf(points, at_least / len(values))


def abs_diff_by_probability(pair: PairArrays) -> BinnedDiff:
    """Mean |d| by the rollout probability of the token."""
    tokens = finite_tokens(pair)
    probability = np.exp(np.minimum(tokens.rollout_logprob, 0.0))
    return _binned(tokens, probability, np.array(PROBABILITY_EDGES))


def abs_diff_by_position(pair: PairArrays) -> BinnedDiff:
    """Mean |d| by position in the response: equal bins up to 96 tokens, geometric ones beyond."""
    tokens = finite_tokens(pair)
    length = int(tokens.position.max(initial=0)) + 1
    if length <= _FIRST_POSITIONS * _POSITION_BINS:
        width = -(-length // _POSITION_BINS)
        edges = np.arange(0, length + width, width, dtype=np.float64)
    else:
        edges = np.append(0.0, np.geomspace(_FIRST_POSITIONS, length, _POSITION_BINS).round())
    return _binned(tokens, tokens.position.astype(np.float64), edges)


def _binned(tokens: Tokens, values: Floats, edges: Floats) -> BinnedDiff:
    """Bins [edges[k], edges[k+1]), the last one closed."""
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    n = np.bincount(index, minlength=len(edges) - 1)
    kept = np.flatnonzero(n)
    estimates = {str(k): tokens.mean_where(tokens.abs_log_ratio, index == k) for k in kept}
    cells = evaluate(estimates, seed=_SEED, replicates=_REPLICATES)
    rows = [(cell.value, cell.ci_low, cell.ci_high) for cell in cells.values()]
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)  # None becomes NaN
    return BinnedDiff(edges[kept], edges[kept + 1], n[kept], table[:, 0], table[:, 1], table[:, 2])
