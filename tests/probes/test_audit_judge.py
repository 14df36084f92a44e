"""Verdicts of checks: it is the interval that decides, and rare events are judged by their rate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mismatch_probe.probes.audit.judge import judged, judged_event, judged_extreme, missing, verdict_of
from mismatch_probe.results.audit import Bounds, Check
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

ABOVE = Bounds(warn_above=1.0, fail_above=10.0, source="us")
BELOW = Bounds(warn_below=0.5, fail_below=0.1)
RARE = Bounds(event="fail", rate_below=0.05)
E = Finding(code="told", severity="info")


def of(low: float, value: float, high: float, bounds: Bounds = ABOVE, why: str = "") -> Check:
    return judged("kl_k3", MetricValue(value, low, high, why), bounds, E)


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [
        (0.1, 0.2, 0.9, "ok"),
        (0.5, 0.9, 1.1, "inconclusive"),
        (0.5, 1.05, 1.1, "inconclusive"),
        (1.1, 2.0, 9.0, "warn"),
        (2.0, 9.0, 11.0, "inconclusive"),
        (10.1, 12.0, 20.0, "fail"),
    ],
)
def test_the_interval_decides(low: float, value: float, high: float, verdict: str) -> None:
    assert of(low, value, high).verdict == verdict


def test_what_may_be_is_told() -> None:
    check = of(2.0, 9.0, 11.0)
    assert (check.best, check.worst) == ("warn", "fail")
    check = of(0.05, 0.2, 0.6, BELOW)
    assert (check.best, check.worst) == ("ok", "fail")


def test_limits_on_both_sides() -> None:
    bounds = Bounds(warn_below=-0.1, warn_above=0.1)
    assert of(-0.05, 0.0, 0.05, bounds).verdict == "ok"
    assert of(-0.2, 0.0, 0.2, bounds).verdict == "inconclusive"
    assert of(0.15, 0.2, 0.3, bounds).verdict == "warn"


def test_an_uncalibrated_interval_counts_at_twice_its_width() -> None:
    assert of(0.5, 0.7, 0.9).verdict == "ok"
    assert of(0.5, 0.7, 0.9, why="uncalibrated: fewer than 32 prompts").verdict == "inconclusive"
    assert of(1e-5, 2e-5, 3e-5, why="uncalibrated: fewer than 32 prompts").verdict == "ok"


def test_a_value_without_an_interval_is_inconclusive_unless_it_was_counted() -> None:
    value = MetricValue(20.0)
    assert judged("x", value, ABOVE, E).verdict == "inconclusive"
    assert judged("x", value, ABOVE, E, exact=True).verdict == "fail"


def test_what_was_not_measured_may_be_anything() -> None:
    assert missing("x", ABOVE, "no engine", E).verdict == "inconclusive"
    assert missing("x", ABOVE, "no engine", E).worst == "fail"
    assert missing("x", Bounds(warn_above=1.0), "no engine", E).worst == "warn"
    assert missing("x", RARE, "no engine", E).worst == "fail"


def test_a_maximum_within_its_limits_is_judged_by_the_rate_of_what_was_not_seen() -> None:
    bounds = Bounds(warn_above=1.0, fail_above=10.0, rate_below=0.05)

    def verdict(value: float, n_prompts: int, bounds: Bounds = bounds) -> str:
        return judged_extreme("max_abs_logprob_diff", MetricValue(value), bounds, E, n_prompts=n_prompts).verdict

    assert verdict(0.5, 73) == "ok"
    assert verdict(0.5, 71) == "inconclusive"
    assert verdict(11.0, 1) == "fail"
    assert verdict(0.5, 10_000, ABOVE) == "inconclusive"
    assert verdict(11.0, 1, ABOVE) == "fail"


def event(hits: int, n_prompts: int, bounds: Bounds = RARE) -> Check:
    return judged_event("x", hits, MetricValue(0.5, 0.1, 0.9), bounds, E, n_prompts=n_prompts)


def test_rare_events_are_judged_by_prompts() -> None:
    assert event(1, 1000).verdict == "fail"
    assert event(0, 73).verdict == "ok"
    assert event(0, 73).value.ci_high == pytest.approx(1 - 0.025 ** (1 / 73))
    assert (event(0, 72).verdict, event(0, 71).worst) == ("ok", "warn")
    assert (event(0, 35).worst, event(0, 36).worst) == (
        "fail",
        "warn",
    )  # more than one prompt in ten is excluded, or not
    assert event(0, 0).worst == "fail"
    assert event(0, 10, Bounds(event="warn", rate_below=0.05)).worst == "warn"
    assert event(0, 10_000, Bounds(event="fail")).verdict == "inconclusive"


@pytest.mark.parametrize(("rate", "n_prompts"), [(0.1, 36), (0.05, 72), (0.01, 368), (0.005, 736)])
def test_the_prompts_that_a_rate_needs_are_told(rate: float, n_prompts: int) -> None:
    bounds = Bounds(event="fail", rate_below=rate)
    settle = event(0, 20, bounds).settle
    assert settle is not None
    more = settle.more_prompts
    assert more is not None
    assert n_prompts - 20 <= more <= 1.1 * (n_prompts - 20)
    assert event(0, n_prompts, bounds).verdict == "ok"
    assert event(0, n_prompts - 1, bounds).verdict == "inconclusive"
    assert event(0, n_prompts, bounds).settle is None


def more_prompts(value: MetricValue, fail_above: float, n_prompts: int) -> int | None:
    check = judged("x", value, Bounds(fail_above=fail_above), E, n_prompts=n_prompts)
    assert check.verdict == "inconclusive"
    assert check.settle is not None
    assert (check.settle.more_prompts is None) == (check.settle.unknown == ("x",))
    return check.settle.more_prompts


def test_the_prompts_that_an_interval_needs_are_told() -> None:
    assert more_prompts(MetricValue(0.5, 0.25, 1.5), 1.0, 64) == 97  # (log 3 / log 2)² · 64, less 64
    few = MetricValue(0.5, 0.4, 0.7, "uncalibrated: fewer than 32 prompts")
    assert more_prompts(few, 0.9, 20) == 13
    assert more_prompts(MetricValue(1.0, 0.5, 2.0), 1.0, 64) is None
    assert more_prompts(MetricValue(None), 1.0, 64) is None


def test_the_severity_of_the_evidence_is_that_of_the_verdict() -> None:
    checks = [of(0.1, 0.2, 0.3), of(2.0, 3.0, 4.0), of(11.0, 12.0, 13.0), of(2.0, 9.0, 11.0)]
    assert [check.finding.severity for check in checks] == ["info", "warn", "fail", "note"]


def test_an_uncalibrated_interval_without_width_says_nothing() -> None:
    assert of(0.5, 0.5, 0.5, why="uncalibrated: fewer than 32 prompts").verdict == "inconclusive"
    assert of(0.5, 0.5, 0.5).verdict == "ok"


def test_nan_is_inconclusive() -> None:
    nan = float("nan")
    assert {of(*row).verdict for row in ((0.1, nan, 0.2), (nan, 0.1, 0.2), (0.1, 0.1, nan))} == {"inconclusive"}


def test_the_verdict_is_the_worst_that_is_certain_or_cannot_be_excluded() -> None:
    good, bad = of(0.1, 0.2, 0.3), of(11.0, 12.0, 13.0)
    warns, open_warn, open_fail = of(2.0, 3.0, 4.0), of(0.5, 0.9, 1.1), of(2.0, 9.0, 11.0)
    assert verdict_of([good]) == "ok"
    assert verdict_of([good, warns]) == "warn"
    assert verdict_of([good, open_warn]) == "warn"
    assert verdict_of([good, open_fail]) == "inconclusive"
    assert verdict_of([open_fail, bad]) == "fail"
    assert verdict_of([]) == "inconclusive"


@settings(deadline=None)
@given(st.floats(1e-6, 100), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_a_wider_interval_never_decides_more(value: float, narrow: float, more: float) -> None:
    first = of(value / narrow, value, value * narrow)
    second = of(value / (narrow * more), value, value * narrow * more)
    order = ("ok", "warn", "fail")
    assert order.index(second.best) <= order.index(first.best)
    assert order.index(second.worst) >= order.index(first.worst)
