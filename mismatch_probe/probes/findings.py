"""What follows from the numbers of a comparison, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mismatch_probe.metrics.conclusions import FP32_FLOOR
from mismatch_probe.metrics.length_prediction import LengthForecast
from mismatch_probe.metrics.paired import paired_ratio
from mismatch_probe.metrics.ratio_test import RatioTest
from mismatch_probe.probes.pairs import PairResult
from mismatch_probe.report.matrix import pair_label, trainer_modes
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding, Severity
from mismatch_probe.types import MetricValue

METRIC = "mean_abs_logprob_diff"


def findings(
    pairs: Sequence[Pair],
    diagonal: Mapping[str, PairResult],
    forecasts: Mapping[str, LengthForecast],
    seed: int,
) -> tuple[Finding, ...]:
    """What a comparison found, the most important first.

    Args:
        pairs: Every pair that was compared.
        diagonal: Those with equal dtypes on both sides, by dtype.
        forecasts: What longer responses do, by dtype.
        seed: Of the bootstrap.
    """
    same = {name: result.pair for name, result in diagonal.items()}
    found = [*_excluded(pairs)]
    if "bfloat16" in diagonal and "float16" in diagonal:
        bf16, fp16 = diagonal["bfloat16"].sums, diagonal["float16"].sums
        found.append(_formats(paired_ratio(bf16, fp16, METRIC, seed=seed), len(bf16.prompt_ids)))
    if "float32" in same:
        found.append(_floor(same["float32"].metrics[METRIC]))
    return (*found, *_one_sided(same), *_exact(same), *_budget(same), *_lengths(forecasts))


def _excluded(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """What is left out of every metric; comes before whatever the metrics say."""
    modes = trainer_modes(pairs)
    for pair in pairs:
        if pair.n_excluded:
            rows = tuple(f"{row.side} {row.value} {row.n}" for row in pair.excluded)
            yield Finding(
                code="excluded-tokens",
                severity="warn",
                where=pair_label(pair, modes),
                values={
                    "n_excluded": pair.n_excluded,
                    "n_tokens": pair.n_tokens,
                    "excluded": rows,
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
