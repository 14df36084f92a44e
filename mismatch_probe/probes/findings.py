"""What follows from the numbers of a comparison, as findings.

The kind of gap, rounding, more than rounding, or unclear, is one decision on the whole comparison. Rounding of one
format leaves four marks: FP32, where it is 2⁻¹⁶ of BF16's, leaves almost nothing (`FP32_FLOOR`); the mean importance
ratio stays 1 on policy; FP16 rounds 8 times more finely than BF16; and every token has log-probs. What breaks one of
them is more than rounding; where a mark was not measured, or too few prompts measured it, the kind is unclear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mismatch_probe.config import RECORDED
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.metrics.conclusions import FP32_FLOOR
from mismatch_probe.metrics.intervals import BOOTSTRAP_PROMPTS
from mismatch_probe.metrics.length_prediction import LengthForecast
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.ratio_test import MIN_PROMPTS, MIN_TOKENS, RatioTest
from mismatch_probe.probes.groups import LAG
from mismatch_probe.probes.pairs import PairResult
from mismatch_probe.report.data import pair_label, trainer_modes
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.manifest import RunStatus
from mismatch_probe.types import MetricValue

METRIC = "mean_abs_logprob_diff"
# Mean |d| in BF16, nats, above which slime's CI fails; other formats in proportion to their unit roundoff.
LARGEST_BF16_GAP = 0.1
_HALVES = ("bfloat16", "float16")
_MOST_PROMPTS = 10**6
HEADLINES = (METRIC, "kl_k3", "kl_exact", "ess_seq", "max_abs_logprob_diff")


def largest_gap(dtype: str) -> float:
    """The largest mean |d|, nats, that rounding in a 16-bit `dtype` explains."""
    return LARGEST_BF16_GAP * DTYPE_INFOS[dtype].unit_roundoff / DTYPE_INFOS["bfloat16"].unit_roundoff


def kind_of(pairs: Sequence[Pair], same: Mapping[str, Pair], formats: MetricValue | None) -> Finding:
    """The kind of the gap, as one finding.

    Args:
        pairs: Every pair that was compared.
        same: Those of equal dtypes, by dtype; of several trainer modes the first.
        formats: Mean |d| in BF16 over that in FP16; None where either is missing.

    Returns:
        `kind-more-than-rounding` with the codes of its `evidence`; else `kind-unclear` with `open`, what was not
        measured well enough, and `more_prompts`, which would settle it (None where prompts do not); else
        `kind-rounding`.
    """
    halves = {name: same[name] for name in _HALVES if name in same and same[name].n_prompts_usable}
    floor = same.get("float32")
    evidence = _evidence(pairs, same, halves, formats)
    if evidence:
        return Finding(code="kind-more-than-rounding", severity="warn", values={"evidence": evidence})
    if all(pair.rollout_dtype == pair.trainer_dtype == RECORDED for pair in pairs):
        return Finding(code="kind-unclear", severity="note", values={"open": ("recorded",), "more_prompts": None})
    needed: dict[str, int | None] = {}
    if floor is None or not floor.n_prompts_usable:
        needed["no-fp32"] = None
    elif (more := _until(floor, floor.metrics[METRIC], FP32_FLOOR, -1)) != 0:
        needed["fp32-floor"] = more
    if not halves:
        needed["no-16-bit"] = None
    for name, pair in halves.items():
        if (more := _until(pair, pair.metrics[METRIC], largest_gap(name), -1)) != 0:
            needed[f"size-{name}"] = more
        overall = next((test for test in pair.ratio_tests if test.family == "overall"), None)
        if overall is not None and overall.verdict == "inconclusive":
            prompts, tokens = max(1, overall.n_prompts), max(1, overall.n_tokens)
            wanted = max(MIN_PROMPTS, math.ceil(prompts * MIN_TOKENS / tokens))
            needed[f"mean-ratio-{name}"] = max(1, wanted - prompts)
    if formats is not None and len(halves) == 2 and (more := _until(halves["float16"], formats, 1.0, 1)) != 0:
        needed["bf16-over-fp16"] = more
    if needed:
        prompts_needed = [more for more in needed.values() if more is not None]
        values = {"open": tuple(needed), "more_prompts": max(prompts_needed, default=None)}
        return Finding(code="kind-unclear", severity="note", values=values)
    return Finding(code="kind-rounding", severity="info", values={"dtypes": tuple(halves)})


def _evidence(
    pairs: Sequence[Pair], same: Mapping[str, Pair], halves: Mapping[str, Pair], formats: MetricValue | None
) -> tuple[str, ...]:
    """Codes of what rounding does not do, none twice."""
    found = []
    floor = same["float32"].metrics[METRIC].value if "float32" in same else None
    if floor is not None and floor >= FP32_FLOOR:
        found.append("fp32-floor")
    if any(test.verdict == "violated" for pair in same.values() for test in pair.ratio_tests):
        found.append("mean-ratio-not-one")
    if any(pair.n_excluded for pair in pairs):
        found.append("excluded-tokens")
    if formats is not None and formats.ci_high is not None and formats.ci_high < 1:
        found.append("bf16-over-fp16")
    lows = {name: pair.metrics[METRIC].ci_low for name, pair in halves.items()}
    if any(low is not None and low > largest_gap(name) for name, low in lows.items()):
        found.append("size")
    return tuple(found)


def _until(pair: Pair, value: MetricValue, bound: float, side: int) -> int | None:
    """How many more prompts show that a value lies on one side of a bound: 0 where they have, None where none would.

    Args:
        pair: Whose prompts.
        value: With its interval, which narrows as 1/√prompts.
        bound: What it has to lie below or above.
        side: −1 for below, 1 for above.
    """
    low, high = value.ci_low, value.ci_high
    if value.value is None:
        return None
    if low is None or high is None:
        return max(1, BOOTSTRAP_PROMPTS - pair.n_prompts_usable) if pair.n_prompts_usable < BOOTSTRAP_PROMPTS else None
    near, distance = (high, bound - value.value) if side < 0 else (low, value.value - bound)
    if side * (near - bound) > 0:
        return 0
    if distance <= 0:
        return None
    wanted = math.ceil(pair.n_prompts_usable * ((near - value.value) / distance) ** 2)
    more = max(1, wanted - pair.n_prompts_usable)
    return more if more <= _MOST_PROMPTS else None


"""Metrics whose limits are findings: those that every report shows first."""


def findings(
    pairs: Sequence[Pair],
    same: Mapping[str, Pair],
    formats: MetricValue | None,
    forecasts: Mapping[str, LengthForecast],
    status: RunStatus = "complete",
) -> tuple[Finding, ...]:
    """What a comparison found, the most important first; last what limits its numbers.

    Args:
        pairs: Every pair that was compared.
        same: Those with equal dtypes on both sides, by dtype.
        formats: Mean |d| in BF16 over that in FP16, see `format_ratio`.
        forecasts: What longer responses do, by dtype.
        status: Of the run.
    """
    unfinished = _unfinished(status)
    if all(pair.n_excluded == pair.n_tokens > 0 for pair in pairs):
        return (_all_unusable(pairs), *unfinished)  # whatever else there is to say follows from it
    usable = {name: pair for name, pair in same.items() if pair.n_prompts_usable}
    found = [*_excluded(pairs), kind_of(pairs, same, formats)]
    if formats is not None:
        found.append(_formats(formats, same["bfloat16"].n_prompts))
    if "float32" in usable:
        found.append(_floor(usable["float32"].metrics[METRIC]))
    results = (*_one_sided(usable), *_stale(usable), *_exact(usable), *_budget(usable), *_lengths(forecasts))
    return (*found, *results, *unfinished, *_off_policy(pairs), *_limits(pairs))


def format_ratio(diagonal: Mapping[str, PairResult], seed: int) -> MetricValue | None:
    """Mean |d| in BF16 over that in FP16, paired by prompt; None where either is missing or has no usable token."""
    pair = [diagonal[name] for name in ("bfloat16", "float16") if name in diagonal]
    if len(pair) < 2 or not all(result.pair.n_prompts_usable for result in pair):
        return None
    return paired_ratio(pair[0].sums, pair[1].sums, METRIC, seed=seed)


def _all_unusable(pairs: Sequence[Pair]) -> Finding:
    rows = {f"{row.side} {row.value}": 0 for pair in pairs for row in pair.excluded}
    for pair in pairs:
        for row in pair.excluded:
            rows[f"{row.side} {row.value}"] += row.n
    return Finding(
        code="all-unusable",
        severity="fail",
        values={
            "n_tokens": sum(pair.n_tokens for pair in pairs),
            "n_pairs": len(pairs),
            "excluded": tuple(f"{name} {n}" for name, n in rows.items()),
        },
    )


def _unfinished(status: RunStatus) -> tuple[Finding, ...]:
    if status == "complete":
        return ()
    return (Finding(code="run-unfinished", severity="note", values={"status": status}),)


def _off_policy(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """One finding for all pairs whose tokens one other policy sampled."""
    by_reason: dict[str, list[Pair]] = {}
    for pair in pairs:
        if not pair.on_policy:
            by_reason.setdefault(pair.metrics["ess_seq"].why, []).append(pair)
    for why, some in by_reason.items():
        yield Finding(code="off-policy", severity="note", where=_named(some, pairs), values={"why": why})


def _limits(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Reasons beside headline metrics; those that several metrics and pairs share are one finding."""
    metrics: dict[tuple[str, str], list[str]] = {}
    usable = [pair for pair in pairs if pair.n_prompts_usable]  # what is not has been said
    for key in HEADLINES:
        # Why a value is absent has been said where another policy sampled; exact ones are absent by request.
        shown = [
            pair
            for pair in usable
            if pair.metrics[key].value is not None or not (key == "kl_exact" or not pair.on_policy)
        ]
        for why in dict.fromkeys(pair.metrics[key].why for pair in shown):
            if why:
                some = [pair for pair in shown if pair.metrics[key].why == why]
                metrics.setdefault((why, _named(some, shown)), []).append(key)
    for (why, where), keys in metrics.items():
        yield Finding(code="limited-metrics", severity="note", where=where, values={"metrics": tuple(keys), "why": why})


def _named(some: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    """The labels of `some` of `pairs`: `all pairs`, or `float16 → all` where no trainer of a rollout is missing."""
    if len(some) == len(pairs) > 1:
        return "all pairs"
    names, modes = [], trainer_modes(pairs)
    for rollout in dict.fromkeys(pair.rollout_dtype for pair in some):
        chosen, everyone = ([p for p in group if p.rollout_dtype == rollout] for group in (some, pairs))
        whole = len(chosen) == len(everyone) > 1
        names += [f"{rollout} → all"] if whole else [pair_label(pair, modes) for pair in chosen]
    return ", ".join(names)


def _excluded(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """What is left out of every metric; comes before whatever the metrics say."""
    modes = trainer_modes(pairs)
    for pair in pairs:
        if pair.n_excluded:
            yield Finding(
                code="excluded-tokens",
                severity="warn",
                where=pair_label(pair, modes),
                values={
                    "n_excluded": pair.n_excluded,
                    "n_tokens": pair.n_tokens,
                    "excluded": tuple(f"{row.side} {row.value} {row.n}" for row in pair.excluded),
                    "mean_abs": pair.metrics[METRIC].value,
                    "mean_abs_all_finite": pair.mean_abs_logprob_diff_all_finite,
                },
            )


def _formats(ratio: MetricValue, n_prompts: int) -> Finding:
    reversed_ = ratio.ci_high is not None and ratio.ci_high < 1
    severity: Severity = "warn" if reversed_ else "info"
    return Finding(code="bf16-over-fp16", severity=severity, values={"ratio": ratio, "n_prompts": n_prompts})


def _floor(floor: MetricValue) -> Finding:
    severity: Severity = "note"
    if floor.value is not None and floor.value >= FP32_FLOOR:
        severity = "warn"
    elif floor.ci_high is not None and floor.ci_high < FP32_FLOOR:
        severity = "info"
    return Finding(code="fp32-floor", severity=severity, values={"gap": floor, "bound": FP32_FLOOR})


def _one_sided(same: Mapping[str, Pair]) -> Iterator[Finding]:
    """The largest violation of E[ρ] = 1 in each pair."""
    for name, pair in same.items():
        broken = [test for test in pair.ratio_tests if test.verdict == "violated"]
        if broken:
            worst = max(broken, key=_size)
            yield Finding(
                code="mean-ratio-not-one",
                severity="warn",
                where=name,
                values={"mean_ratio": worst.mean_ratio, "family": worst.family},
            )


def _size(test: RatioTest) -> float:
    return abs((test.mean_ratio.value or 1.0) - 1.0)


def _stale(same: Mapping[str, Pair]) -> Iterator[Finding]:
    """How much of the gap tokens of older weights make, where a dump names the weights of its tokens."""
    for name, pair in same.items():
        ages = {int(group.label): group for group in pair.groups if group.key == LAG}
        n_stale = sum(group.n_tokens for age, group in ages.items() if age > 0)
        if n_stale:
            none = MetricValue(None, why="no token is of the trainer's own weights")
            values: dict[str, Value] = {
                "n_stale": n_stale,
                "n_tokens": pair.n_tokens,
                "oldest": max(ages),
                "fresh": ages[0].metrics[METRIC] if 0 in ages else none,
                "all": pair.metrics[METRIC],
            }
            yield Finding(code="stale-weights", severity="info", where=name, values=values)


def _exact(same: Mapping[str, Pair]) -> Iterator[Finding]:
    exact = {name: pair.metrics["kl_exact"] for name, pair in same.items()}
    exact = {name: value for name, value in exact.items() if value.value is not None}
    if exact:
        yield Finding(code="exact-kl", severity="info", values={"kl": exact})


def _budget(same: Mapping[str, Pair]) -> Iterator[Finding]:
    ratios = {name: pair.budget["measured_over_predicted"] for name, pair in same.items() if pair.budget is not None}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio.value is not None}
    if ratios:
        yield Finding(code="error-budget", severity="info", values={"measured_over_predicted": ratios})


def _lengths(forecasts: Mapping[str, LengthForecast]) -> Iterator[Finding]:
    for name, found in forecasts.items():
        half, tenth = found.crossings[0.5], found.crossings[0.1]
        if half.value is not None:
            yield Finding(
                code="ess-half-length",
                severity="info",
                where=name,
                values={
                    "half": half,
                    "tenth": tenth,
                    "observed_length": found.fit.observed_length,
                    "mark": found.mark(0.5),
                },
            )
        elif found.fit.contradicted and not found.fit.predictable:
            yield Finding(code="no-forecast", severity="note", where=name, values={"why": found.fit.why})
