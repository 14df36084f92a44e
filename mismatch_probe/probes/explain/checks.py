"""What metrics of the same steps say together: identities, inequalities, and what follows from two of them.

All of it holds for means over the same tokens. With d = log π − log μ and m = mean |d|: k3 − k1 = mean ρ − 1; by
Jensen's inequality ½ m² ≤ k2, e⁻ᵐ − 1 + m ≤ k3 and eᵐ ≤ mean exp|d|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.course import Jump, Trend, largest_jump, trend
from mismatch_probe.probes.explain.collect import Course
from mismatch_probe.results.finding import Finding, Value
from mismatch_probe.types import MetricValue

Floats = NDArray[np.float64]
_SLACK = 1e-2  # relative: logs round to a few digits
_FLAT = 1e-9
_LARGE_JUMP = 10.0
_STEADY_TAU, _STEADY_P = 0.3, 0.01
_LOW_PEARSON, _SMALL_PROB_DIFF = 0.98, 0.005
_FEW_STEPS = 8
_TOLD_FIRST = ("kl_k3", "mean_abs_logprob_diff", "mean_abs_prob_diff", "token_mult_prob_error", "kl_k2", "kl_k1")
_SIZES = ("mean_abs_logprob_diff", "kl_k3", "mean_abs_prob_diff", "kl_k2")
# Of d from a normal distribution around 0: 2 k3 / (mean |d|)² = π/2.
_NORMAL_TAIL, _HEAVY_TAIL = math.pi / 2, 4.0


@dataclass(frozen=True)
class Together:
    """Two courses at the steps that both have.

    Attributes:
        steps: `[N]`.
        first: `[N]` values of one.
        second: `[N]` values of the other.
    """

    steps: Floats
    first: Floats
    second: Floats


def together(first: Course, second: Course) -> Together:
    """Both courses at their common steps."""
    steps, one, two = np.intersect1d(first.steps, second.steps, assume_unique=True, return_indices=True)
    return Together(steps, first.values[one], second.values[two])


@dataclass(frozen=True)
class Group:
    """The metrics of one run that one framework logs.

    Attributes:
        framework: Whose.
        run: The run.
        courses: Its courses with a finite value.
    """

    framework: str
    run: str
    courses: tuple[Course, ...]

    def by_key(self, *keys: str) -> tuple[Course, ...]:
        """The first course of each key; empty where one is missing."""
        found = [next((one for one in self.courses if one.key == key), None) for key in keys]
        return () if None in found else tuple(one for one in found if one is not None)

    def context(self, kind: str) -> Course | None:
        """The course that helps with something."""
        return next((one for one in self.courses if one.reported.context == kind), None)


Check = Callable[[Group], Iterator[Finding]]


def check_all(group: Group) -> Iterator[Finding]:
    """What every check finds."""
    for check in (_possible, _same_tokens, _order, _direction, _caps, _pearson, _tail, _sequences, _moves):
        yield from check(group)


def _possible(group: Group) -> Iterator[Finding]:
    """Values that the metric cannot have, and values that are exactly those of equal log-probs."""
    for one in group.courses:
        if one.key not in CATALOG or "level-by-setting" in one.reported.traits:
            continue
        low, high = CATALOG[one.key].bounds
        outside = int(((one.values < low) | (one.values > high)).sum())
        if outside:
            worst = float(one.values[np.argmax(np.maximum(low - one.values, one.values - high))])
            yield Finding(
                code="log-impossible",
                severity="warn",
                where=one.label,
                values={"metric": one.key, "n": outside, "steps": len(one.values), "value": worst},
            )
    sizes = [one for one in group.courses if one.key in _SIZES]
    zeros = [one for one in sizes if not one.values.any() and "four-decimals" not in one.reported.traits]
    if zeros:
        yield Finding(
            code="log-all-zero",
            severity="warn",
            where=zeros[0].label,
            values={"names": tuple(one.name for one in zeros), "steps": max(len(one.values) for one in zeros)},
        )


_LOWEST: dict[str, Callable[[Floats], Floats]] = {
    "kl_k2": lambda m: m**2 / 2,
    "kl_k3": lambda m: np.expm1(-m) + m,
    "token_mult_prob_error": np.exp,
}
"""What mean |d| implies at least."""


def _same_tokens(group: Group) -> Iterator[Finding]:
    for key, lowest in _LOWEST.items():
        if not (found := group.by_key("mean_abs_logprob_diff", key)):
            continue
        both = together(*found)
        least = lowest(both.first)
        short = (both.second < least * (1 - _SLACK) - _FLAT) & np.isfinite(least)
        if short.any():
            at = int(np.argmax(short))
            yield Finding(
                code="log-not-same-tokens",
                severity="note",
                where=found[1].label,
                values={
                    "mean": found[0].name,
                    "value": float(both.second[at]),
                    "least": float(least[at]),
                    "step": float(both.steps[at]),
                    "n": int(short.sum()),
                    "steps": len(both.steps),
                },
            )


def _order(group: Group) -> Iterator[Finding]:
    for mean, largest in (
        ("mean_abs_logprob_diff", "max_abs_logprob_diff"),
        ("mean_abs_prob_diff", "max_abs_prob_diff"),
    ):
        if found := group.by_key(mean, largest):
            both = together(*found)
            wrong = both.first > both.second * (1 + _SLACK) + _FLAT
            if wrong.any():
                yield Finding(
                    code="log-mean-above-maximum",
                    severity="warn",
                    where=found[0].label,
                    values={"maximum": found[1].name, "n": int(wrong.sum()), "steps": len(wrong)},
                )


def mean_over_steps(values: Floats) -> MetricValue:
    """The mean with its 95 % interval, of independent steps."""
    mean = float(values.mean())
    if len(values) < _FEW_STEPS:
        return MetricValue(mean, why="fewer than 8 steps")
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return MetricValue(mean, mean - half, mean + half)


def _direction(group: Group) -> Iterator[Finding]:
    """On policy E[ρ] = 1, so that k1 and k3 have the same expectation; a single k1 may be negative."""
    if found := group.by_key("kl_k1", "kl_k3"):
        both = together(*found)
        excess = both.second - both.first
    else:
        found = tuple(one for one in group.by_key("mean_ratio") if "after-truncation" not in one.reported.traits)
        excess = found[0].values - 1 if found else np.empty(0)
    if len(excess) >= _FEW_STEPS:
        off = mean_over_steps(excess)
        excludes = off.ci_low is not None and off.ci_high is not None and (off.ci_low > 0 or off.ci_high < 0)
        yield Finding(
            code="log-ratio-not-1" if excludes else "log-ratio-fits-1",
            severity="note" if excludes else "info",
            where=found[0].label,
            values={"names": tuple(one.name for one in found), "excess": off, "steps": len(excess)},
        )
    for one in group.by_key("kl_k1"):
        n_negative = int((one.values < 0).sum())
        if n_negative:
            yield Finding(
                code="log-negative-k1",
                severity="info",
                where=one.label,
                values={"n_negative": n_negative, "steps": len(one.values), "mean": mean_over_steps(one.values)},
            )


def _caps(group: Group) -> Iterator[Finding]:
    """A largest weight that is the same number again and again is the truncation, not the weight."""
    for one in group.courses:
        if not one.reported.what.startswith(("max w", "max ρ")) or len(one.values) < 2:
            continue
        top = float(one.values.max())
        n = int((one.values == top).sum())
        if n > 1 and top > 1:
            yield Finding(
                code="log-capped",
                severity="note",
                where=one.label,
                values={"cap": top, "n": n, "steps": len(one.values)},
            )


def _pearson(group: Group) -> Iterator[Finding]:
    if found := group.by_key("pearson_prob", "mean_abs_prob_diff"):
        both = together(*found)
        low = (both.first < _LOW_PEARSON) & (both.second < _SMALL_PROB_DIFF)
        if low.any():
            at = int(np.flatnonzero(low)[-1])
            yield Finding(
                code="log-pearson-low",
                severity="note",
                where=found[0].label,
                values={
                    "pearson": float(both.first[at]),
                    "difference": float(both.second[at]),
                    "step": float(both.steps[at]),
                    "n": int(low.sum()),
                    "steps": len(low),
                },
            )


def _tail(group: Group) -> Iterator[Finding]:
    """How much larger k2 or k3 is than a normal d of the same mean |d| would make it."""
    for key in ("kl_k3", "kl_k2"):
        if not (found := group.by_key("mean_abs_logprob_diff", key)):
            continue
        both = together(*found)
        ratios = 2 * both.second / both.first**2
        ratios = ratios[np.isfinite(ratios)]
        factor = float(np.median(ratios)) / _NORMAL_TAIL if len(ratios) else 0.0
        if factor > 0:
            code = "log-heavy-tail" if factor > _HEAVY_TAIL else "log-tail"
            yield Finding(
                code=code,
                severity="info",
                where=found[1].label,
                values={"mean": found[0].name, "factor": factor, "steps": len(ratios)},
            )
        return


def _sequences(group: Group) -> Iterator[Finding]:
    """What a KL per token is for a whole response: KL of the sequence, and ESS if D is normal with Var D = 2 KL."""
    length = group.context("length")
    found = group.by_key("kl_k3") or group.by_key("kl_k2")
    if length is None or not found:
        return
    both = together(found[0], length)
    if len(both.steps):
        kl, tokens = float(both.first[-1]), float(both.second[-1])
        if kl > 0 and tokens > 0:
            yield Finding(
                code="log-sequence-effect",
                severity="info",
                where=found[0].label,
                values={
                    "length": tokens,
                    "length_name": length.name,
                    "kl": kl,
                    "kl_sequence": kl * tokens,
                    "ess": math.exp(-2 * kl * tokens),
                    "step": float(both.steps[-1]),
                },
            )


def _moves(group: Group) -> Iterator[Finding]:
    """Jumps and trends that stand out; metrics that move together are one finding, told of the first."""
    jumps: dict[float, list[tuple[Course, Jump]]] = {}
    trends: dict[bool, list[tuple[Course, Trend]]] = {}
    for one in group.courses:
        if one.reported.context:
            continue
        jump = largest_jump(one.values)
        if jump is not None and jump.units is not None and jump.units >= _LARGE_JUMP:
            jumps.setdefault(float(one.steps[jump.before + 1]), []).append((one, jump))
        found = trend(one.steps, one.values)
        if found is not None and abs(found.tau) >= _STEADY_TAU and found.p <= _STEADY_P:
            trends.setdefault(found.tau > 0, []).append((one, found))
    yield from (_jump(jumps[step]) for step in sorted(jumps))
    yield from (_trend(trends[rises]) for rises in (True, False) if rises in trends)


def _jump(found: list[tuple[Course, Jump]]) -> Finding:
    one, jump = min(found, key=lambda item: _rank(item[0]))
    at = jump.before
    values: dict[str, Value] = {
        "before_step": float(one.steps[at]),
        "before": float(one.values[at]),
        "after_step": float(one.steps[at + 1]),
        "after": float(one.values[at + 1]),
        "units": jump.units,
        "others": tuple(other.name for other, _ in found if other is not one),
    }
    return Finding(code="log-jump", severity="note", where=one.label, values=values)


def _trend(found: list[tuple[Course, Trend]]) -> Finding:
    one, slope = min(found, key=lambda item: _rank(item[0]))
    tenth = max(1, len(one.values) // 10)
    values: dict[str, Value] = {
        "slope": slope.per_100,
        "tau": slope.tau,
        "early": float(np.median(one.values[:tenth])),
        "late": float(np.median(one.values[-tenth:])),
        "steps": len(one.values),
        "others": tuple(other.name for other, _ in found if other is not one),
    }
    return Finding(code="log-trend", severity="note", where=one.label, values=values)


def _rank(one: Course) -> int:
    return _TOLD_FIRST.index(one.key) if one.key in _TOLD_FIRST else len(_TOLD_FIRST)
