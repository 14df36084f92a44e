"""Prompt-clustered 95 % intervals.

Tokens of one prompt are not independent, so the prompt is the unit that is resampled. Every mean- or ratio-like
metric is written as a smooth function of pooled means, which needs only per-prompt sums: the tokens are read once,
and a replicate costs one row of a matrix product.

Smooth metrics get a studentised bootstrap over prompts (Efron and Tibshirani 1993, section 12.5) on a working scale
where the estimate is closer to normal, usually its logarithm. Under heavy tails a sample that missed the noisiest
prompts shows the bootstrap neither its error nor its error's error, so the bootstrap may only lengthen a cluster-t
interval, never shorten it, and both use the degrees of freedom that the kurtosis of the prompts' influence leaves
(Satterthwaite 1946, for the variance of a sample variance). `validation/coverage.py` measures the result. Shares get
a Clopper–Pearson interval at the effective sample size (Korn and Graubard 1998), quantiles the inversion of the
interval of a share (Woodruff 1952), rare tokens a Poisson interval (Garwood 1936) at the effective count.

Shape legend: `P` prompts, `K` means, `R` replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.catalog import calibrated_prompts, metric_info
from mismatch_probe.metrics.column import Column
from mismatch_probe.metrics.inference import UPPER_TAIL as UPPER_TAIL
from mismatch_probe.metrics.inference import Floats as Floats
from mismatch_probe.metrics.inference import (
    Inference,
    degrees_of_freedom,
    excess_kurtosis,
    heavy_tail_stretch,
    student,
)
from mismatch_probe.metrics.inference import Interval as Interval
from mismatch_probe.metrics.inference import Working as Working
from mismatch_probe.metrics.info import CALIBRATED_PROMPTS
from mismatch_probe.types import MetricValue

UNCALIBRATED = f"uncalibrated: fewer than {CALIBRATED_PROMPTS} prompts"
NO_INTERVAL = "no interval: fewer than 2 prompts"
NO_SPREAD = "no interval: these prompts do not show how far the value varies"

# Below this, too many replicates consist of one or two prompts, whose spread says little: a cluster-t interval serves.
BOOTSTRAP_PROMPTS = 6
# One prompt that holds more than this share of the squared influence is all that the standard error knows.
_DOMINANT = 0.9
# Samples of normal tokens have bootstrap intervals up to 3 times Student's in 95 %, at most 13 times; one huge token
# makes them 11 to 57 times as long, on a logarithmic scale, which is no statement any more.
_LONGEST_STRETCH = 10.0
# Limits of a positive metric that are further apart than this factor leave it open.
OPEN_FACTOR = 1000.0
_OPEN = f"no interval: its limits would differ by a factor of more than {OPEN_FACTOR:,.0f}"
# Metrics in which a distance on the working scale is a factor.
_BY_FACTOR = (scales.exp, scales.ess_of_log_squared_variation, scales.exp_minus_exp)
_USABLE_SHARE = 0.99
_CHUNK_ELEMENTS = 2_000_000
_COMPLEX_STEP = 1e-80
_ROUNDED = 1e-12
# How many times the tail of a quantile is searched for its limits, before all values are.
_TAILS = 4.0


@dataclass(frozen=True)
class Estimate:
    """A metric as a smooth function of pooled means: `metric(working(means))`, `means = Σ_p sums / Σ_p counts`.

    Attributes:
        sums: `[P, K]` per-prompt sums of the sufficient statistics.
        counts: `[P, K]` per-prompt counts (or weights) that the sums are divided by; 0 where a prompt has no rows.
        working: Means `[..., K]` to the working scale `[...]`. It must accept complex input: the delta method
            differentiates it by a complex step, which loses no digits.
        metric: Monotone map from the working scale to the metric.
        why: What limits the value, if anything.
        least_prompts: Below this many prompts with rows there is no interval.
    """

    sums: Floats
    counts: Floats
    working: Working
    metric: Callable[[float], float]
    why: str = ""
    least_prompts: int = 2

    @property
    def live(self) -> NDArray[np.bool_]:
        """`[P]` prompts that have rows."""
        return np.asarray((self.counts > 0).all(axis=1))


def evaluate(estimates: Mapping[str, Estimate], *, seed: int, replicates: int) -> dict[str, MetricValue]:
    """Value and interval of each estimate; all estimates over equally many prompts share their replicates. Without
    replicates the interval is a cluster-t one.

    Returns:
        A `MetricValue` per key. Its value is None when it overflows float64. It has no interval below
        `Estimate.least_prompts`, where one prompt decides the value, and where the limits would leave it open; `why`
        then says so. Where the key is one of the catalog, the metric's own calibrated number of prompts decides
        whether the interval is marked.
    """
    inferences = infer(estimates, seed=seed, replicates=replicates)
    return {key: _bounded(key, metric_value(key, estimate, inferences[key])) for key, estimate in estimates.items()}


def infer(estimates: Mapping[str, Estimate], *, seed: int, replicates: int) -> dict[str, Inference]:
    """The same on the working scale; `se` is NaN below `Estimate.least_prompts`."""
    live = {key: _live(estimate) for key, estimate in estimates.items()}
    draws: dict[str, list[tuple[Floats, Floats]]] = {key: [] for key in live}
    for n_prompts in sorted({len(estimate.sums) for estimate in live.values()}):
        if n_prompts < BOOTSTRAP_PROMPTS:
            continue
        group = [key for key, estimate in live.items() if len(estimate.sums) == n_prompts]
        for weights in _prompt_weights(n_prompts, seed, replicates):
            for key in group:
                draws[key].append(_working_and_se(live[key], weights))
    return {key: _infer(estimate, draws[key]) for key, estimate in live.items()}


def _live(estimate: Estimate) -> Estimate:
    return replace(estimate, sums=estimate.sums[estimate.live], counts=estimate.counts[estimate.live])


def _prompt_weights(n_prompts: int, seed: int, replicates: int) -> Iterator[Floats]:
    """Multinomial weights `[R', P]` in chunks of bounded memory; the stream does not depend on the chunking."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // n_prompts)
    share = np.full(n_prompts, 1.0 / n_prompts)
    for start in range(0, replicates, rows):
        size = min(rows, replicates - start)
        yield rng.multinomial(n_prompts, share, size=size).astype(np.float64)


def _working_and_se(estimate: Estimate, weights: Floats) -> tuple[Floats, Floats]:
    """Working value `[R]` and its linearised cluster standard error `[R]` under prompt weights `[R, P]`."""
    n_prompts = len(estimate.sums)
    totals = weights @ estimate.counts
    means = (weights @ estimate.sums) / totals
    with np.errstate(all="ignore"):
        working = estimate.working(means)
        slopes = _gradient(estimate.working, means) / totals
        influence = slopes @ estimate.sums.T - (slopes * means) @ estimate.counts.T
        variance = np.einsum("rp,rp->r", weights, influence**2) * n_prompts / (n_prompts - 1)
        return working, np.sqrt(variance)


def _gradient(working: Working, means: Floats) -> Floats:
    gradient = np.empty_like(means)
    for k in range(means.shape[-1]):
        shifted = means.astype(np.complex128)
        shifted[..., k] += 1j * _COMPLEX_STEP
        gradient[..., k] = working(shifted).imag / _COMPLEX_STEP
    return gradient


def influence(estimate: Estimate) -> Floats:
    """`[P]` change of the working value per unit of weight of each live prompt; they sum to 0."""
    return _influence(_live(estimate))[0]


def _influence(estimate: Estimate) -> tuple[Floats, float]:
    """The same of an estimate whose prompts are all live, and the standard error that rounding alone could make."""
    totals = estimate.counts.sum(axis=0, keepdims=True)
    means = estimate.sums.sum(axis=0, keepdims=True) / totals
    with np.errstate(all="ignore"):
        slopes = _gradient(estimate.working, means) / totals
        pull = (slopes @ estimate.sums.T - (slopes * means) @ estimate.counts.T)[0]
        size = np.abs(slopes) @ np.abs(estimate.sums).T + np.abs(slopes * means) @ estimate.counts.T
        rounding = 4 * np.finfo(np.float64).eps * np.sqrt(len(pull)) * size.max()
    return np.asarray(pull), float(rounding)


def _infer(estimate: Estimate, draws: list[tuple[Floats, Floats]]) -> Inference:
    n_prompts = len(estimate.sums)
    with np.errstate(all="ignore"):
        centre = float(estimate.working(estimate.sums.sum(axis=0) / estimate.counts.sum(axis=0)))
    if n_prompts < estimate.least_prompts:
        why = f"no interval: fewer than {estimate.least_prompts} prompts"
        return Inference(centre, np.nan, np.nan, n_prompts, withheld=why)
    pull, rounding = _influence(estimate)
    with np.errstate(all="ignore"):
        se = float(np.sqrt((pull**2).sum() * n_prompts / (n_prompts - 1)))
    if not np.isfinite(centre) or se <= rounding:
        # An exact zero everywhere, e.g. a policy compared with itself, or the same value in every prompt, which a few
        # prompts can have by chance.
        enough = n_prompts >= BOOTSTRAP_PROMPTS or not np.isfinite(centre)
        alike = rounding == 0.0 or (enough and _alike(estimate, centre))
        withheld = "" if alike else NO_SPREAD
        return Inference(centre, 0.0, n_prompts - 1.0, n_prompts, withheld=withheld)
    relative = pull / np.abs(pull).max()  # squares do not overflow
    largest = 1 / float((relative**2).sum())
    if largest > _DOMINANT:
        withheld = f"no interval: one prompt has {_percent(largest)} of the squared influence"
        return Inference(centre, se, n_prompts - 1.0, n_prompts, withheld=withheld)
    if n_prompts < BOOTSTRAP_PROMPTS or not np.isfinite(se):
        return Inference(centre, se, n_prompts - 1.0, n_prompts, withheld="" if np.isfinite(se) else NO_SPREAD)
    degrees = degrees_of_freedom(excess_kurtosis(pull), n_prompts)
    if not draws:  # a cluster-t interval alone was asked for
        return Inference(centre, se, degrees, n_prompts)
    working = np.concatenate([chunk[0] for chunk in draws])
    spread = np.concatenate([chunk[1] for chunk in draws])
    usable = np.isfinite(working) & np.isfinite(spread) & (spread > 0)
    if usable.mean() < _USABLE_SHARE:
        return Inference(centre, se, degrees, n_prompts)
    t = (working[usable] - centre) / spread[usable]
    t_low, t_high = np.quantile(t, (1 - UPPER_TAIL, UPPER_TAIL))
    stretch = heavy_tail_stretch(degrees, n_prompts) / student(degrees)
    longest = (max(1.0, float(t_high) * stretch), max(1.0, -float(t_low) * stretch))
    withheld = ""
    if max(longest) > _LONGEST_STRETCH:
        withheld = f"no interval: a few prompts decide it ({max(longest):.0f} times Student's)"
    return Inference(centre, se, degrees, n_prompts, *longest, withheld)


def _alike(estimate: Estimate, centre: float) -> bool:
    """Whether every prompt that gives a working value alone gives the pooled one."""
    with np.errstate(all="ignore"):
        own = estimate.working(estimate.sums / estimate.counts)
        close = np.abs(own - centre) <= 1e-9 * max(1.0, abs(centre))
    return bool(((own == centre) | close | np.isnan(own)).all())


def _bounded(key: str, value: MetricValue) -> MetricValue:
    """Without limits that metric `key` cannot have: its scale does not fit these prompts, or log-probs are above 0."""
    info = metric_info(key)
    if info is None or value.value is None or value.ci_low is None or value.ci_high is None:
        return value
    low, high = info.bounds
    ends = max(low, value.ci_low), min(high, value.ci_high)
    if max(abs(ends[0] - value.ci_low), abs(ends[1] - value.ci_high)) > _ROUNDED:
        return MetricValue(
            value.value, why=join_why(value.why, f"no interval: its limits lie beyond {low:g} … {high:g}")
        )
    return replace(value, ci_low=ends[0], ci_high=ends[1])


def metric_value(key: str, estimate: Estimate, inference: Inference) -> MetricValue:
    """Value and interval of metric `key` on its own scale."""
    value, limits, why = _on_own_scale(estimate, inference)
    if value is None or limits is None:
        if value is not None and inference.n_prompts > estimate.least_prompts and inference.se > 0:
            why = join_why(why, _without_the_largest(estimate))
        return MetricValue(value, why=join_why(estimate.why, why))
    counts = estimate.counts[estimate.live, 0]
    return with_interval(value, limits, inference.n_prompts, estimate.why, key=key, effective=kish(counts))


def _on_own_scale(estimate: Estimate, inference: Inference) -> tuple[float | None, Interval | None, str]:
    """Value and limits, or why there are none."""
    with np.errstate(all="ignore"):
        value = float(estimate.metric(inference.centre)) + 0.0  # no negative zero
        ends = [float(estimate.metric(limit)) for limit in inference.limits]
    if not np.isfinite(value):
        return None, None, "overflows float64"
    if inference.withheld:
        return value, None, inference.withheld
    if not np.isfinite(ends).all():
        return value, None, "no interval: its upper limit overflows float64"
    # A spread below the resolution of float64 about the value.
    if inference.se > 0 and min(ends) == max(ends):
        ends = [float(np.nextafter(value, end)) for end in (-np.inf, np.inf)]
    lower, upper = min(*ends, value) + 0.0, max(*ends, value) + 0.0
    if inference.se > 0 and estimate.metric in _BY_FACTOR and upper > OPEN_FACTOR * lower:
        return value, None, _OPEN
    return value, (lower, upper), ""


def _without_the_largest(estimate: Estimate) -> str:
    """What the value is without the prompt that has most influence on it."""
    live = _live(estimate)
    kept = np.arange(len(live.sums)) != np.argmax(np.abs(influence(live)))
    rest = replace(live, sums=live.sums[kept], counts=live.counts[kept])
    value, limits, _ = _on_own_scale(rest, _infer(rest, []))
    if value is None:
        return ""
    return f"without the prompt of most influence {value:.3g}" + (
        "" if limits is None else f" [{limits[0]:.3g}, {limits[1]:.3g}]"
    )


def kish(counts: Floats) -> float:
    """How many equal prompts those with `counts` `[P]` rows amount to, 1 … P (Kish 1965)."""
    return float(counts.sum() ** 2 / (counts**2).sum())


def with_interval(
    value: float, interval: Interval, n_prompts: int, why: str = "", *, key: str = "", effective: float = np.inf
) -> MetricValue:
    """A `MetricValue` whose interval is marked below the prompts that the coverage of metric `key` asks for.

    Args:
        value: The estimate.
        interval: Its limits.
        n_prompts: Prompts with rows.
        why: What else limits it.
        key: The metric.
        effective: How many equal prompts they amount to. Below half of the calibrated number it is marked, too: where
            one prompt has 90 % of 64 prompts' tokens, the interval of mean |d| covers 79 %.
    """
    info = metric_info(key)
    if info is not None and info.positive and interval[1] > OPEN_FACTOR * interval[0] > 0:
        return MetricValue(value, why=join_why(why, _OPEN))
    needed = calibrated_prompts(key)
    note = ""
    if n_prompts < needed:
        note = f"uncalibrated: fewer than {needed} prompts"
    elif effective < needed / 2:
        note = f"uncalibrated: unequal prompts, which count as {effective:.3g} of the {needed} needed"
    return MetricValue(value, interval[0], interval[1], join_why(why, note))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def join_why(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def share_interval(
    hits: Floats, counts: Floats, *, heavy_tailed: bool = False, most: float = np.inf
) -> Interval | None:
    """Interval of a share, Clopper–Pearson at the effective sample size (Korn and Graubard 1998).

    Args:
        hits: `[P]` rows per prompt that have the property.
        counts: `[P]` rows per prompt.
        heavy_tailed: Whether a few prompts can have most hits, so that these have fewer degrees of freedom.
        most: At most so many independent rows, e.g. those looked at where the rows above stand for others.

    Returns:
        Limits in [0, 1], None below 2 prompts. Without any hit the design effect is unknown and taken as 1.
    """
    hits, counts = hits[counts > 0], counts[counts > 0]
    n = counts.sum()
    if len(counts) < 2:
        return None
    share = hits.sum() / n
    effective = min(n, most)
    squared_half_width = _squared_half_width(hits, counts, heavy_tailed)
    if squared_half_width > 0 and n > 1:
        effective = min(effective, share * (1 - share) * student(float(n) - 1) ** 2 / squared_half_width)
    k = share * effective
    low = special.betaincinv(k, effective - k + 1, 1 - UPPER_TAIL) if share > 0 else 0.0
    high = special.betaincinv(k + 1, effective - k, UPPER_TAIL) if share < 1 else 1.0
    return float(low), float(high)


def rare_share_interval(hits: Floats, counts: Floats) -> Interval:
    """Interval of the share of very rare rows: a Poisson count's (Garwood 1936), at the effective count of clusters.

    The arguments are those of `share_interval`. Without any hit, and below 2 prompts, the rows count as independent.
    """
    k, n = float(hits.sum()), float(counts.sum())
    live = counts > 0
    inflation = 1.0
    if k > 0 and live.sum() > 1:
        inflation = max(1.0, _squared_half_width(hits[live], counts[live], True) * n**2 / (k * student(np.inf) ** 2))
    low, high = poisson_interval(k / inflation)
    return min(1.0, low * inflation / n), min(1.0, high * inflation / n)


def _squared_half_width(hits: Floats, counts: Floats, heavy_tailed: bool) -> float:
    """Squared half-width of the cluster-t interval of a share, over P ≥ 2 prompts with rows."""
    n_prompts, n = len(counts), counts.sum()
    pull = (hits - hits.sum() / n * counts) / n
    degrees = n_prompts - 1.0
    if heavy_tailed and n_prompts >= BOOTSTRAP_PROMPTS:
        degrees = degrees_of_freedom(excess_kurtosis(pull), n_prompts)
    return float((pull**2).sum() * n_prompts / (n_prompts - 1) * student(degrees) ** 2)


def quantile_interval(
    values: Floats | Column,
    prompt: NDArray[np.int64],
    length: NDArray[np.int64],
    level: float,
    *,
    absolute: bool = False,
) -> tuple[float, Interval | None]:
    """A quantile and its prompt-clustered interval (Woodruff 1952).

    Args:
        values: `[N]` the values, those of a sequence next to each other.
        prompt: `[S]` prompt of each sequence.
        length: `[S]` values of each sequence.
        level: The quantile's level, e.g. 0.99.
        absolute: Whether it is of |values|.

    Returns:
        The quantile and its limits, None below 2 prompts. No limit can lie beyond the largest value seen.
    """
    column = values if isinstance(values, Column) else Column.of(values)
    of: Callable[[Floats], Floats] = np.abs if absolute else np.asarray
    tail = 1 - level
    value, start = column.quantiles((level, max(0.0, 1 - _TAILS * tail)), of)
    counts = np.bincount(prompt, weights=length).astype(np.float64, copy=False)

    def hits(holds: Callable[[Floats], NDArray[np.bool_]]) -> Floats:
        sums = column.run_sums(lambda part: holds(of(part)), length)
        return np.bincount(prompt, weights=sums).astype(np.float64, copy=False)

    def share(holds: Callable[[Floats], NDArray[np.bool_]]) -> Interval | None:
        return share_interval(hits(holds), counts, heavy_tailed=True)

    def possible(interval: Interval | None) -> bool:
        return interval is None or interval[0] <= tail

    interval = share(lambda x: x > value)
    if interval is None:
        return value, None
    if hits(lambda x: x == value).sum() <= 1:
        low, high = column.quantiles((1 - interval[1], 1 - interval[0]), of)
        return value, (min(value, low), max(value, high))
    # Among ties the share above the value is not 1 − level: the limits are the last values that the share of values
    # beyond them does not exclude. Both lie in the tail, where it is long enough to hold them.
    short = possible(share(lambda x: x > start))
    points = column.distinct_from(-np.inf if short else start, of)
    at = int(np.searchsorted(points, value))
    low = _last(points[: at + 1][::-1], lambda point: possible(share(lambda x: x > point)))
    high = _last(points[at:], lambda point: (share(lambda x: x >= point) or (0.0, 1.0))[1] > tail)
    return value, (low, high)


def _last(points: Floats, holds: Callable[[float], bool]) -> float:
    """The last of `points` before the first, after point 0, that does not hold, by bisection."""
    first, end = 0, len(points)
    while end - first > 1:
        middle = (first + end) // 2
        first, end = (middle, end) if holds(float(points[middle])) else (first, middle)
    return float(points[first])


def poisson_interval(count: float) -> Interval:
    """Two-sided 95 % interval of a Poisson mean (Garwood 1936); (0, 3.69) for a count of 0."""
    low = special.gammaincinv(count, 1 - UPPER_TAIL) if count else 0.0
    return float(low), float(special.gammaincinv(count + 1, UPPER_TAIL))
