"""From a value with its interval and a check's bounds to a status: it is the interval that has to be on one side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mismatch_probe.probes.audit.profile import Bounds, title_of
from mismatch_probe.types import MetricValue

Level = Literal["pass", "warn", "fail"]
Status = Literal["pass", "warn", "fail", "not judged"]
_ORDER: tuple[Level, ...] = ("pass", "warn", "fail")
UNCALIBRATED = "uncalibrated"


@dataclass(frozen=True)
class Check:
    """One named check of a pair.

    Attributes:
        name: A metric of the catalog, or one of `profile.OWN_CHECKS`.
        best, worst: The levels that the value may have: they differ where the data leave it open.
        limits: Of the value, by name; empty for an event.
        value: With its interval, None where nothing was measured; then `why` says so.
        threshold, source: In words.
        evidence: A sentence.
        where: The module that decides, where one does.
        exact: Whether the value was counted or computed, so that it needs no interval.
    """

    name: str
    best: Level
    worst: Level
    value: MetricValue
    limits: Mapping[str, float]
    threshold: str
    source: str
    evidence: str
    where: str | None = None
    exact: bool = False

    @property
    def status(self) -> Status:
        return self.best if self.best == self.worst else "not judged"

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": title_of(self.name),
            "status": self.status,
            "best": self.best,
            "worst": self.worst,
            "why": "",
            **self.value.as_dict(),
            "exact": self.exact,
            "limits": dict(self.limits),
            "threshold": self.threshold,
            "source": self.source,
            "evidence": self.evidence,
            "where": self.where,
        }


def judged(
    name: str, value: MetricValue, bounds: Bounds, evidence: str, where: str | None = None, *, exact: bool = False
) -> Check:
    """Judges a value.

    Args:
        name: Of the check.
        value: With its interval. One that is marked uncalibrated counts at twice its width.
        bounds: Its limits.
        evidence: A sentence.
        where: The module that decides.
        exact: Whether the value was counted or computed, so that it needs no interval.
    """
    about = (bounds.limits, bounds.text(), bounds.source)
    ends = (value.value, value.value) if exact and value.value is not None else _ends(value)
    if value.value is None or ends is None:
        return Check(name, "pass", _worst(bounds), value, *about, evidence, where)
    levels = [_level(end, bounds) for end in ends]
    # Limits on both sides of an interval make its middle better than either end.
    middle = _level(value.value, bounds)
    best, worst = min([*levels, middle], key=_ORDER.index), max(levels, key=_ORDER.index)
    return Check(name, best, worst, value, *about, evidence, where, exact)


def judged_event(
    name: str, hits: int, rate: MetricValue, bounds: Bounds, evidence: str, where: str | None = None
) -> Check:
    """Judges a rare event: one that occurred is what its bounds call it, one that did not is judged by the upper limit
    of its rate.
    """
    about = (bounds.limits, bounds.text(), bounds.source)
    event: Level = bounds.event or "pass"
    if hits:
        return Check(name, event, event, rate, *about, evidence, where)
    shown = rate.value is not None and _is_rare(rate, bounds)
    return Check(name, "pass", "pass" if shown else event, rate, *about, evidence, where)


def judged_extreme(name: str, value: MetricValue, rate: MetricValue, bounds: Bounds, evidence: str) -> Check:
    """Judges a maximum or a count: one beyond a limit is, and of one within them a larger sample may show worse, unless
    the upper limit of the rate of what was not seen is low enough.
    """
    check = replace(judged(name, value, bounds, evidence, exact=True), exact=False)
    shown = bounds.rate_below is not None and _is_rare(rate, bounds)
    return check if shown or check.best == "fail" else replace(check, worst=_worst(bounds))


def _is_rare(rate: MetricValue, bounds: Bounds) -> bool:
    return bounds.rate_below is None or (rate.ci_high is not None and rate.ci_high < bounds.rate_below)


def missing(name: str, bounds: Bounds, why: str) -> Check:
    """A check that nothing was measured for."""
    worst = bounds.event or _worst(bounds)
    return Check(name, "pass", worst, MetricValue(None, why=why), bounds.limits, bounds.text(), bounds.source, why)


def verdict(checks: list[Check]) -> Status:
    """Fail where a check fails; not judged where one may; warn where one warns or is not shown to pass; else pass."""
    if any(check.best == "fail" for check in checks):
        return "fail"
    if not checks or any(check.worst == "fail" for check in checks):
        return "not judged"
    return "warn" if any(check.worst == "warn" for check in checks) else "pass"


def _worst(bounds: Bounds) -> Level:
    return "fail" if bounds.fail_above is not None or bounds.fail_below is not None else "warn"


def _level(value: float, bounds: Bounds) -> Level:
    if (bounds.fail_above is not None and value > bounds.fail_above) or (
        bounds.fail_below is not None and value < bounds.fail_below
    ):
        return "fail"
    above = bounds.warn_above is not None and value > bounds.warn_above
    below = bounds.warn_below is not None and value < bounds.warn_below
    return "warn" if above or below else "pass"


def _ends(value: MetricValue) -> tuple[float, float] | None:
    """The interval's ends, at twice its width where its coverage was not shown, on the log scale where it can be."""
    low, high, middle = value.ci_low, value.ci_high, value.value
    if low is None or high is None or middle is None:
        return None
    if UNCALIBRATED not in value.why:
        return low, high
    if low > 0:
        return low * low / middle, high * high / middle
    return middle - 2 * (middle - low), middle + 2 * (high - middle)
