"""Checks of the gap itself: log-probs, the FP32 pair, mean importance ratio, sequence weights at a planned length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mismatch_probe.metrics.intervals import poisson_interval
from mismatch_probe.metrics.length_prediction import FURTHEST
from mismatch_probe.metrics.ratio_test import MIN_PROMPTS
from mismatch_probe.probes.audit.checks import Subject, check, finding, upper
from mismatch_probe.probes.audit.judge import judged, judged_event, made, missing
from mismatch_probe.results.audit import Bounds, Check, Settle
from mismatch_probe.results.comparison import LengthGrowth, Pair
from mismatch_probe.types import MetricValue

_FLOOR = "mean_abs_logprob_diff"


@check("nonfinite_logprobs", rare=True)
def nonfinite_logprobs(subject: Subject, bounds: Bounds) -> Check | None:
    pair = subject.pair
    if pair is None:
        return None
    n, total, n_prompts = pair.n_excluded, pair.n_tokens, pair.n_prompts_usable
    low, high = poisson_interval(n)
    rate = MetricValue(n / total if total else None, low / max(1, total), high / max(1, total))
    told = finding(
        "audit-logprobs-not-finite" if n else "audit-logprobs-finite",
        n=n,
        n_tokens=total,
        values=tuple(f"{row.side} {row.value}: {row.n:,}" for row in pair.excluded),
        upper=upper(n, n_prompts),
    )
    return judged_event("nonfinite_logprobs", n, rate, bounds, told, n_prompts=n_prompts)


@check("fp32_floor")
def fp32_floor(subject: Subject, bounds: Bounds) -> Check | None:
    if subject.pair is None:
        return None
    name = "fp32_floor"
    floor = next((p for p in subject.pairs if (p.rollout_dtype, p.trainer_dtype) == ("float32", "float32")), None)
    if floor is None:
        settle = Settle(dtypes=("float32",))
        return missing(name, bounds, "the run has no FP32 pair", finding("audit-no-fp32-pair"), settle)
    if floor.n_excluded:
        told = finding("audit-fp32-pair-not-finite", n=floor.n_excluded, n_tokens=floor.n_tokens)
        return missing(name, bounds, "tokens of the FP32 pair have no usable log-probs", told)
    value = floor.metrics[_FLOOR]
    return judged(name, value, bounds, finding("audit-fp32-floor", value=value), n_prompts=floor.n_prompts_usable)


@check("one_sided", rare=True)
def one_sided(subject: Subject, bounds: Bounds) -> Check | None:
    """Whether the mean importance ratio is 1: shown where no test is violated and its interval lies near 1."""
    pair = subject.pair
    if pair is None or not pair.on_policy:
        return None
    name, mean, n_prompts = "one_sided", pair.metrics["mean_ratio"], pair.n_prompts_usable
    if mean.value is None or bounds.within is None:
        return missing(name, bounds, mean.why, finding("audit-metric-missing", metric="mean_ratio", why=mean.why))
    broken = [test for test in pair.ratio_tests if test.verdict == "violated"]
    if broken:
        worst = max(broken, key=lambda test: abs((test.mean_ratio.value or 0.0) - 1))
        level = bounds.event or "fail"
        told = finding("audit-mean-ratio-off", value=worst.mean_ratio, family=worst.family)
        return made(name, level, level, worst.mean_ratio, bounds, told)
    overall = next((test for test in pair.ratio_tests if test.family == "overall"), None)
    if overall is None or overall.verdict == "inconclusive":
        why = "no test was made" if overall is None else overall.mean_ratio.why
        more = max(0, MIN_PROMPTS - n_prompts) or None
        settle = None if more is None else Settle(more_prompts=more)
        told = finding("audit-mean-ratio-untested", value=mean, why=why)
        return made(name, "ok", bounds.event or "warn", mean, bounds, told, settle=settle)
    near = Bounds(fail_below=1 - bounds.within, fail_above=1 + bounds.within)
    shown = judged(name, mean, near, finding("audit-mean-ratio"), n_prompts=n_prompts)
    negligible = overall.verdict == "violated but negligible"
    if shown.verdict == "ok":
        return made(name, "ok", "ok", mean, bounds, finding("audit-mean-ratio", value=mean, negligible=negligible))
    told = finding("audit-mean-ratio-open", value=mean, negligible=negligible, within=bounds.within)
    return made(name, "ok", bounds.event or "fail", mean, bounds, told, settle=shown.settle)


@check("ess_seq_planned")
def ess_seq_planned(subject: Subject, bounds: Bounds) -> Check | None:
    pair = subject.pair
    if pair is None:
        return None
    name, value = "ess_seq_planned", planned_ess(subject.pairs, subject.length, pair)
    if value is None:
        return None
    if value.value is None:
        told = finding("audit-planned-ess-missing", length=subject.planned_tokens, why=value.why)
        return missing(name, bounds, value.why, told, _longer(subject, pair))
    told = finding("audit-planned-ess", length=subject.planned_tokens, value=value)
    if "extrapolated" in value.why:
        value = MetricValue(value.value, None, None, value.why)  # shown, but no ground to judge on
        check = judged(name, value, bounds, told)
        return made(name, check.best, check.worst, value, bounds, told, settle=_longer(subject, pair))
    return judged(name, value, bounds, told, n_prompts=pair.n_prompts_usable)


def _longer(subject: Subject, pair: Pair) -> Settle | None:
    """Responses that are long enough to predict the planned length from; None where those here are."""
    found = subject.length.get(_named(pair))
    if found is None or subject.planned_tokens <= FURTHEST * found.observed_length:
        return None
    return Settle(max_tokens=-(-subject.planned_tokens // FURTHEST))


def planned_ess(pairs: Sequence[Pair], length: Mapping[str, LengthGrowth], pair: Pair) -> MetricValue | None:
    """The predicted ESS of a pair's sequence weights; None where the pair has no prediction of its own."""
    same = [p for p in pairs if (p.rollout_dtype, p.trainer_dtype) == (pair.rollout_dtype, pair.trainer_dtype)]
    # Of several trainer modes the first one was predicted.
    if same[0].trainer_mode != pair.trainer_mode:
        return MetricValue(None, why=f"only the mode {same[0].trainer_mode} was predicted")
    found = length.get(_named(pair))
    return found.predictions[0].values["ess_seq"] if found is not None and found.predictions else None


def _named(pair: Pair) -> str:
    """What the comparison calls a pair whose growth with length it looks at."""
    same = pair.rollout_dtype == pair.trainer_dtype
    return pair.rollout_dtype if same else f"recorded → {pair.trainer_dtype}"
