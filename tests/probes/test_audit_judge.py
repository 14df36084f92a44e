"""Statuses of checks: it is the interval that decides, and rare events are judged by their rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.probes.audit.judge import Check, judged, judged_event, judged_extreme, missing, verdict
from mismatch_probe.probes.audit.profile import Bounds
from mismatch_probe.types import MetricValue

ABOVE = Bounds(warn_above=1.0, fail_above=10.0, source="us")
BELOW = Bounds(warn_below=0.5, fail_below=0.1)
RARE = Bounds(event="fail", rate_below=1e-3)


def of(low: float, value: float, high: float, bounds: Bounds = ABOVE, why: str = "") -> Check:
    return judged("kl_k3", MetricValue(value, low, high, why), bounds, "e")


@pytest.mark.parametrize(
    ("low", "value", "high", "status"),
    [
        (0.1, 0.2, 0.9, "pass"),
        (0.5, 0.9, 1.1, "not judged"),
        (0.5, 1.05, 1.1, "not judged"),
        (1.1, 2.0, 9.0, "warn"),
        (2.0, 9.0, 11.0, "not judged"),
        (10.1, 12.0, 20.0, "fail"),
    ],
)
def test_the_interval_decides(low: float, value: float, high: float, status: str) -> None:
    assert of(low, value, high).status == status


def test_what_may_be_is_told() -> None:
    check = of(2.0, 9.0, 11.0)
    assert (check.best, check.worst) == ("warn", "fail")
    check = of(0.05, 0.2, 0.6, BELOW)
    assert (check.best, check.worst) == ("pass", "fail")


def test_limits_on_both_sides() -> None:
    bounds = Bounds(warn_below=-0.1, warn_above=0.1)
    assert of(-0.05, 0.0, 0.05, bounds).status == "pass"
    assert of(-0.2, 0.0, 0.2, bounds).status == "not judged"
    assert of(0.15, 0.2, 0.3, bounds).status == "warn"


def test_an_uncalibrated_interval_counts_at_twice_its_width() -> None:
    assert of(0.5, 0.7, 0.9).status == "pass"
    assert of(0.5, 0.7, 0.9, why="uncalibrated: fewer than 32 prompts").status == "not judged"
    assert of(1e-5, 2e-5, 3e-5, why="uncalibrated: fewer than 32 prompts").status == "pass"


def test_a_value_without_an_interval_is_not_judged_unless_it_was_counted() -> None:
    value = MetricValue(20.0)
    assert judged("x", value, ABOVE, "e").status == "not judged"
    assert judged("x", value, ABOVE, "e", exact=True).status == "fail"


def test_what_was_not_measured_may_be_anything() -> None:
    assert missing("x", ABOVE, "no engine").status == "not judged"
    assert missing("x", ABOVE, "no engine").worst == "fail"
    assert missing("x", Bounds(warn_above=1.0), "no engine").worst == "warn"
    assert missing("x", RARE, "no engine").worst == "fail"


def test_a_maximum_within_its_limits_is_judged_by_the_rate_of_what_was_not_seen() -> None:
    few, many = MetricValue(0.0, 0.0, 0.05), MetricValue(0.0, 0.0, 1e-4)
    bounds = Bounds(warn_above=1.0, fail_above=10.0, rate_below=1e-3)
    assert judged_extreme("max_abs_logprob_diff", MetricValue(0.5), many, bounds, "e").status == "pass"
    assert judged_extreme("max_abs_logprob_diff", MetricValue(0.5), few, bounds, "e").status == "not judged"
    assert judged_extreme("max_abs_logprob_diff", MetricValue(11.0), few, bounds, "e").status == "fail"
    assert judged_extreme("max_abs_logprob_diff", MetricValue(0.5), many, ABOVE, "e").status == "not judged"
    assert judged_extreme("max_abs_logprob_diff", MetricValue(11.0), few, ABOVE, "e").status == "fail"


def test_rare_events() -> None:
    assert judged_event("x", 1, MetricValue(1e-6, 0, 1e-5), RARE, "e").status == "fail"
    assert judged_event("x", 0, MetricValue(0.0, 0.0, 9e-4), RARE, "e").status == "pass"
    assert judged_event("x", 0, MetricValue(0.0, 0.0, 2e-3), RARE, "e").status == "not judged"
    assert judged_event("x", 0, MetricValue(0.0, 0.0, 2e-3), Bounds(event="warn", rate_below=1e-3), "e").worst == "warn"
    assert judged_event("x", 0, MetricValue(None), RARE, "e").status == "not judged"
    assert judged_event("x", 0, MetricValue(0.0, 0.0, 0.5), Bounds(event="fail"), "e").status == "pass"


def test_the_verdict_is_the_worst_that_is_certain_or_cannot_be_excluded() -> None:
    good, bad = of(0.1, 0.2, 0.3), of(11.0, 12.0, 13.0)
    warns, open_warn, open_fail = of(2.0, 3.0, 4.0), of(0.5, 0.9, 1.1), of(2.0, 9.0, 11.0)
    assert verdict([good]) == "pass"
    assert verdict([good, warns]) == "warn"
    assert verdict([good, open_warn]) == "warn"
    assert verdict([good, open_fail]) == "not judged"
    assert verdict([open_fail, bad]) == "fail"
    assert verdict([]) == "not judged"


@given(st.floats(1e-6, 100), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_a_wider_interval_never_decides_more(value: float, narrow: float, more: float) -> None:
    first = of(value / narrow, value, value * narrow)
    second = of(value / (narrow * more), value, value * narrow * more)
    order = ("pass", "warn", "fail")
    assert order.index(second.best) <= order.index(first.best)
    assert order.index(second.worst) >= order.index(first.worst)
