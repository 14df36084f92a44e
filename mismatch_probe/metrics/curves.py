"""Plot-ready tables: what figures draw, computed here so that they compute nothing.

Shape legend: `S` sequences, `K` bins or points. Only usable tokens and sequences count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.accumulate import DENSITY_BINS, PairSums, as_sums
from mismatch_probe.metrics.chunks import Ints
from mismatch_probe.metrics.intervals import Estimate, Floats, Interval, evaluate
from mismatch_probe.metrics.sample import PairTokens, usable_sequences, usable_tokens
from mismatch_probe.metrics.summary import intercept, off_policy_why, slope_per_1k
from mismatch_probe.metrics.sums import UNIT_POSITIONS, BinnedSums
from mismatch_probe.types import MetricValue

# Codes of `token_kind` are indices into this.
KINDS = ("digit", "word", "punctuation", "space", "mixed", "special", "unknown")
_CCDF_POINTS = 400
_POSITION_BINS = 12
_FIRST_POSITIONS = UNIT_POSITIONS // _POSITION_BINS
_SEED = 0
_REPLICATES = 1000
ENTROPY_EDGES = np.array([0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 6.0, np.inf])
RANK_EDGES = np.array([0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0, np.inf])
KIND_EDGES: Floats = np.arange(len(KINDS) + 1, dtype=np.float64)
# Columns of a pair that are binned, in addition to its own probability and position.
COLUMN_EDGES: dict[str, Floats] = {"entropy": ENTROPY_EDGES, "rank": RANK_EDGES, "token_kind": KIND_EDGES}


@cache
def kind_of(text: str | None) -> int:
    """The code of a token that is not special. White space around something else does not count."""
    if text is None:
        return KINDS.index("unknown")
    core = text.strip()
    if not core:
        return KINDS.index("space" if text else "unknown")
    if all(character.isnumeric() for character in core):
        return KINDS.index("digit")
    if all(character.isalpha() or character in "'’" for character in core):
        return KINDS.index("word")
    if not any(character.isalnum() for character in core):
        return KINDS.index("punctuation")
    return KINDS.index("mixed")


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


def policy_density(pair: PairTokens) -> PolicyDensity:
    """Joint histogram of exp(b) and exp(a) in 50 equal bins per axis."""
    sums = as_sums(pair)
    return PolicyDensity(edges=np.linspace(0.0, 1.0, DENSITY_BINS + 1), counts=sums.density, n=sums.n_usable)


def length_curve(pair: PairTokens) -> LengthCurve:
    """D against length with the line of `seq_log_ratio_slope_per_1k`; no line for an off-policy pair."""
    sums = as_sums(pair)
    sequences = usable_sequences(sums)
    slope = line = MetricValue(None, why=off_policy_why(sums, "seq_log_ratio_slope_per_1k"))
    if not slope.why and len(sequences) == 0:
        slope = line = MetricValue(None, why="no usable sequences")
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


def abs_diff_ccdf(pair: PairTokens) -> Ccdf:
    """Tail of |d| at up to 400 of its quantiles, spaced evenly in the logarithm of the share."""
    sums = as_sums(pair)
    n, n_positive = sums.n_usable, int(usable_tokens(sums).per_prompt(lambda d: d != 0).sum())
    if n_positive == 0:
        return Ccdf(np.empty(0), np.empty(0))
    ranks = np.unique(np.geomspace(1, n_positive, _CCDF_POINTS).round().astype(np.int64))
    values, smaller = sums.log_ratio.ranked(n - ranks, np.abs)
    points, first = np.unique(values, return_index=True)
    return Ccdf(points, (n - smaller[first]) / n)


def abs_diff_by_probability(pair: PairTokens) -> BinnedDiff:
    """Mean |d| by the rollout probability of the token."""
    return binned_diff(as_sums(pair).binned["probability"])


def abs_diff_by_position(pair: PairTokens) -> BinnedDiff:
    """Mean |d| by position in the response: equal bins up to 96 tokens, near-geometric ones beyond."""
    return binned_diff(position_bins(as_sums(pair)))


def position_bins(sums: PairSums) -> BinnedSums:
    """Sums by position in as many bins as a figure shows."""
    fine = sums.binned["position"]
    length = max(sums.longest, 1)
    if length <= UNIT_POSITIONS:
        width = -(-length // _POSITION_BINS)
        edges = np.arange(0, length + width, width, dtype=np.float64)
    else:
        edges = np.append(0.0, np.geomspace(_FIRST_POSITIONS, length, _POSITION_BINS))
    first = np.unique(np.abs(fine.edges[:, None] - edges[:-1]).argmin(axis=0))
    return fine.merged(first, end=float(edges[-1]))


def binned_diff(sums: BinnedSums) -> BinnedDiff:
    """Mean |d| in each bin, with its interval."""
    n = sums.count.sum(axis=0).astype(np.int64)
    kept = np.flatnonzero(n)
    estimates = {
        str(k): Estimate(sums.abs_log_ratio[:, [k]], sums.count[:, [k]], scales.log_mean, scales.exp) for k in kept
    }
    cells = evaluate(estimates, seed=_SEED, replicates=_REPLICATES)
    rows = [(cell.value, cell.ci_low, cell.ci_high) for cell in cells.values()]
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)  # None becomes NaN
    return BinnedDiff(sums.edges[kept], sums.edges[1:][kept], n[kept], table[:, 0], table[:, 1], table[:, 2])


@dataclass(frozen=True)
class WhereBin:
    """A bin of a token property.

    Attributes:
        label: E.g. `"0.01–0.03"` or `"digit"`.
        n_tokens: Tokens in it.
        fraction_of_tokens: Of all tokens whose property is known.
        contribution: Its part of Σ d².
        mean_abs: Mean |d|, nats, with its 95 % interval over prompts; limits are None where there is none.
        ci_low: Lower limit.
        ci_high: Upper limit.
    """

    label: str
    n_tokens: int
    fraction_of_tokens: float
    contribution: float
    mean_abs: float
    ci_low: float | None
    ci_high: float | None


def where(sums: PairSums) -> dict[str, list[WhereBin]]:
    """Bins by `probability` (of the rollout), `entropy` and `rank` (by the trainer), `position` and `token_kind`.

    A property that no token of the pair carries is left out, and so are empty bins.
    """
    by = {"probability": sums.binned["probability"], "position": position_bins(sums)}
    by |= {name: sums.binned[name] for name in COLUMN_EDGES if name in sums.binned}
    order = ("probability", "entropy", "rank", "position", "token_kind")
    return {name: _bins(name, by[name]) for name in order if name in by and by[name].count.any()}


def _bins(name: str, sums: BinnedSums) -> list[WhereBin]:
    diff = binned_diff(sums)
    square, count = sums.squared_log_ratio.sum(axis=0), sums.count.sum(axis=0)
    kept = np.flatnonzero(count)
    total = float(square.sum())
    return [
        WhereBin(
            label=_label(name, float(diff.left[i]), float(diff.right[i])),
            n_tokens=int(count[k]),
            fraction_of_tokens=float(count[k] / count.sum()),
            contribution=float(square[k] / total) if total > 0 else 0.0,
            mean_abs=float(diff.mean_abs[i]),
            ci_low=_or_none(float(diff.ci_low[i])),
            ci_high=_or_none(float(diff.ci_high[i])),
        )
        for i, k in enumerate(kept)
    ]


def _label(name: str, low: float, high: float) -> str:
    if name == "token_kind":
        return KINDS[int(low)]
    if name in ("rank", "position"):
        last = high - 1
        return f"{low:.0f}" if last == low else f"≥ {low:.0f}" if np.isinf(high) else f"{low:.0f}–{last:.0f}"
    return f"≥ {low:g}" if np.isinf(high) else f"{low:g}–{high:g}"


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
