"""What follows from the numbers of a comparison, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mismatch_probe.metrics.conclusions import FP32_FLOOR
from mismatch_probe.metrics.length_prediction import LengthForecast
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.ratio_test import RatioTest
from mismatch_probe.probes.kind import METRIC, kind_of
from mismatch_probe.probes.pairs import PairResult
from mismatch_probe.report.matrix import pair_label, trainer_modes
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding, Severity
from mismatch_probe.results.manifest import RunStatus
from mismatch_probe.types import MetricValue

HEADLINES = (METRIC, "kl_k3", "kl_exact", "ess_seq", "max_abs_logprob_diff")
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
    results = (*_one_sided(usable), *_exact(usable), *_budget(usable), *_lengths(forecasts))
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
