"""From a value with its interval and a check's bounds to a verdict: it is the interval that has to be on one side.

No check is ok for want of evidence: a value needs an interval, and an event that did not occur or a maximum needs as
many prompts as exclude the rate that its bounds name. Of such events the prompt is the unit: what one token of a prompt
does, others of it do, and an overflow takes the prompt's whole loss with it. So 0 of 64 prompts excludes only rates
above 5.6 %, however many tokens they have. Only what was counted over all there is (weights, the engine's refusal), or
claims nothing beyond what ran (the FP16 pass), needs no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

from mismatch_probe.metrics.inference import UPPER_TAIL
from mismatch_probe.metrics.info import CALIBRATED_PROMPTS
from mismatch_probe.metrics.power import rounded_up
from mismatch_probe.results.audit import Bounds, Check, Level, Settle, Verdict
from mismatch_probe.results.finding import Finding, Severity
from mismatch_probe.types import MetricValue

_ORDER: tuple[Level, ...] = get_args(Level)
_SEVERITIES: dict[Verdict, Severity] = {"ok": "info", "warn": "warn", "fail": "fail", "inconclusive": "note"}
UNCALIBRATED = "uncalibrated"
# An event that more than one prompt in ten would show, and none did, is no ground to refuse a model: it can only warn.
_COMMON = 0.1
_MOST_PROMPTS = 1_000_000


def made(
    name: str,
    best: Level,
    worst: Level,
    value: MetricValue,
    bounds: Bounds,
    evidence: Finding,
    *,
    exact: bool = False,
    settle: Settle | None = None,
) -> Check:
    """A check; its verdict and the severity of its evidence follow from what the data leave open.

    Args:
        name: Of the check.
        best, worst: The verdicts that the data leave open.
        value: What was measured.
        bounds: Its limits.
        evidence: Whatever its severity.
        exact: Whether the value needs no interval.
        settle: What would settle it; nothing known for None.
    """
    verdict: Verdict = best if best == worst else "inconclusive"
    return Check(
        name=name,
        verdict=verdict,
        best=best,
        worst=worst,
        value=value,
        exact=exact,
        bounds=bounds,
        finding=evidence.model_copy(update={"severity": _SEVERITIES[verdict]}),
        settle=(settle or Settle(unknown=(name,))) if verdict == "inconclusive" else None,
    )


def judged(
    name: str, value: MetricValue, bounds: Bounds, evidence: Finding, *, exact: bool = False, n_prompts: int = 0
) -> Check:
    """Judges a value.

    Args:
        name: Of the check.
        value: With its interval. One that is marked uncalibrated counts at twice its width, and says nothing without
            width.
        bounds: Its limits.
        evidence: What was found.
        exact: Whether the value was counted or computed, so that it needs no interval.
        n_prompts: That the value is of; 0 where they do not decide.
    """
    ends = (value.value, value.value) if exact and value.value is not None else _ends(value)
    if value.value is None or ends is None or any(map(math.isnan, (value.value, *ends))):
        return made(name, "ok", _worst(bounds), value, bounds, evidence)
    levels = [_level(end, bounds) for end in ends]
    # Limits on both sides of an interval make its middle better than either end.
    middle = _level(value.value, bounds)
    best, worst = min([*levels, middle], key=_ORDER.index), max(levels, key=_ORDER.index)
    settle = _prompts(_more_for_limits(value, bounds, n_prompts))
    return made(name, best, worst, value, bounds, evidence, exact=exact, settle=settle)


def judged_event(
    name: str, hits: int, rate: MetricValue, bounds: Bounds, evidence: Finding, *, n_prompts: int
) -> Check:
    """Judges a rare event: one that occurred is what its bounds call it, one that did not is judged by the upper limit
    of its rate over prompts.

    Args:
        name: Of the check.
        hits: How often it occurred.
        rate: Over tokens, where it did.
        bounds: The event, and the rate of prompts that has to be excluded.
        evidence: What was found.
        n_prompts: Prompts that could have shown it.
    """
    event: Level = bounds.event or "ok"
    if hits:
        return made(name, event, event, rate, bounds, evidence)
    unseen = unseen_rate(n_prompts)
    worst: Level = "ok" if _is_rare(unseen, bounds) else "warn" if (unseen.ci_high or 1.0) < _COMMON else event
    return made(name, "ok", worst, unseen, bounds, evidence, settle=_prompts(_more_for_rate(bounds, n_prompts)))


def judged_extreme(
    name: str, value: MetricValue, bounds: Bounds, evidence: Finding, *, exact: bool = False, n_prompts: int
) -> Check:
    """Judges a maximum or a count: one beyond a limit is, and of one within them a larger sample may show worse, unless
    the upper limit of the rate of prompts that would is low enough. `exact` tells whether the value itself is without
    error, so that an older one compares with it.
    """
    check = judged(name, value, bounds, evidence, exact=True)
    worst = check.worst
    if value.value is not None and check.best != "fail" and not _is_rare(unseen_rate(n_prompts), bounds):
        worst = _worst(bounds)
    settle = _prompts(_more_for_rate(bounds, n_prompts))
    return made(name, check.best, worst, value, bounds, evidence, exact=exact, settle=settle)


def unseen_rate(n_prompts: int) -> MetricValue:
    """The fraction of prompts that shows what none of `n_prompts` did: Clopper–Pearson's."""
    if n_prompts < 1:
        return MetricValue(None, why="no prompts")
    return MetricValue(0.0, 0.0, -math.expm1(math.log1p(-UPPER_TAIL) / n_prompts))


def _is_rare(rate: MetricValue, bounds: Bounds) -> bool:
    return bounds.rate_below is not None and rate.ci_high is not None and rate.ci_high < bounds.rate_below


def _more_for_rate(bounds: Bounds, n_prompts: int) -> int | None:
    """Further prompts, none of which shows the event, that exclude the rate."""
    if bounds.rate_below is None or bounds.rate_below >= 1:
        return None
    return _more(math.log1p(-UPPER_TAIL) / math.log1p(-bounds.rate_below), n_prompts)


def _more_for_limits(value: MetricValue, bounds: Bounds, n_prompts: int) -> int | None:
    """Further prompts that bring the interval to one side of every limit, if it shrinks as 1/√P about its value."""
    low, high, middle = value.ci_low, value.ci_high, value.value
    if not n_prompts or low is None or high is None or middle is None:
        return None
    needed = float(CALIBRATED_PROMPTS) if UNCALIBRATED in value.why else 0.0
    scale = math.log if min(low, *bounds.limits.values()) > 0 else float
    for limit in bounds.limits.values():
        end, way = (scale(x) - scale(middle) for x in (high if limit > middle else low, limit))
        if way == 0:
            return None
        needed = max(needed, n_prompts * (end / way) ** 2 if abs(end) > abs(way) else 0.0)
    return _more(needed, n_prompts)


def _more(needed: float, n_prompts: int) -> int | None:
    more = math.floor(needed) + 1 - n_prompts
    return rounded_up(more) if 0 < more <= _MOST_PROMPTS else None


def _prompts(more: int | None) -> Settle | None:
    return None if more is None else Settle(more_prompts=more)


def missing(name: str, bounds: Bounds, why: str, evidence: Finding, settle: Settle | None = None) -> Check:
    """A check that nothing was measured for."""
    worst = bounds.event or _worst(bounds)
    return made(name, "ok", worst, MetricValue(None, why=why), bounds, evidence, settle=settle)


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """Fail where a check fails; inconclusive where one may; warn where one warns or is not shown to be ok; else ok."""
    found = list(checks)
    if any(check.best == "fail" for check in found):
        return "fail"
    if not found or any(check.worst == "fail" for check in found):
        return "inconclusive"
    return "warn" if any(check.worst == "warn" for check in found) else "ok"


def _worst(bounds: Bounds) -> Level:
    return "fail" if bounds.fail_above is not None or bounds.fail_below is not None else "warn"


def _level(value: float, bounds: Bounds) -> Level:
    if (bounds.fail_above is not None and value > bounds.fail_above) or (
        bounds.fail_below is not None and value < bounds.fail_below
    ):
        return "fail"
    above = bounds.warn_above is not None and value > bounds.warn_above
    below = bounds.warn_below is not None and value < bounds.warn_below
    return "warn" if above or below else "ok"


def _ends(value: MetricValue) -> tuple[float, float] | None:
    """The interval's ends, at twice its width where its coverage was not shown, on the log scale where it can be."""
    low, high, middle = value.ci_low, value.ci_high, value.value
    if low is None or high is None or middle is None:
        return None
    if UNCALIBRATED not in value.why:
        return low, high
    if low == high:
        return None
    if low > 0:
        return low * low / middle, high * high / middle
    return middle - 2 * (middle - low), middle + 2 * (high - middle)
