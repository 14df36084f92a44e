"""Two audits side by side: what differs in how they were made, and which checks are better or worse for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.audit.checks import is_extreme
from mismatch_probe.results.audit import (
    Audit,
    AuditedPair,
    Baseline,
    Change,
    Check,
    CheckChange,
    GoneCheck,
    Level,
    ValueChange,
    Verdict,
)
from mismatch_probe.results.finding import Finding, Value

_ORDER: tuple[Level, ...] = ("ok", "warn", "fail")
# A change of the value alone is a regression only when it is certainly more than this.
TOLERATED = 1.1
# Values that are powers of two; one more or less is what another batch gives.
_EXPONENTS, _ONE_POWER = "fp16_loss_scale", 1.0
_USABLE = ("ok", "warn")


def read_audit(path: str | Path) -> Audit:
    """An `audit.json`, named itself or by the folder that holds it.

    Raises:
        TableError: There is none, or it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        outer, inner = file / "audit.json", file / "audit" / "audit.json"
        file = inner if inner.is_file() and not outer.is_file() else outer
    return Audit.read(file)


def compare_audits(old: Audit, new: Audit, source: str) -> Baseline:
    """Every check that both audits have, with its change, and what is worse.

    The two audits count as independent; where they share prompts, an interval of the change is wider than it had to be.

    Args:
        old: The baseline.
        new: What is compared with it.
        source: Where the baseline was found.
    """
    rows = tuple(_row(pair, before, after) for pair, before, after in _both(old, new))
    return Baseline(
        source=source,
        model=old.model,
        changed=_changed(old, new),
        checks=rows,
        regressions=(*_lost(old, new), *(row for row in rows if row.finding is not None)),
        gone=_gone(old, new),
    )


def _both(old: Audit, new: Audit) -> Iterator[tuple[AuditedPair, Check, Check]]:
    known = {(pair.key, check.name): check for pair in old.pairs for check in pair.checks}
    for pair in new.pairs:
        for check in pair.checks:
            before = known.get((pair.key, check.name))
            if before is not None:
                yield pair, before, check


def _lost(old: Audit, new: Audit) -> Iterator[CheckChange]:
    """Pairs that could be used and now cannot be shown to be: gone, unsupported, or inconclusive."""
    there = {pair.key: pair for pair in new.pairs}
    for pair in old.pairs:
        after = there.get(pair.key)
        if pair.verdict not in _USABLE or (after is not None and after.verdict in _USABLE):
            continue
        known = {check.name for check in pair.checks}
        if after is not None and any(check.best == "fail" and check.name in known for check in after.checks):
            continue  # that check says so itself
        now: Verdict = "inconclusive" if after is None else after.verdict
        why = (
            _worse("audit-pair-gone")
            if after is None
            else _worse("audit-verdict-worse", before=pair.verdict, after=now)
        )
        yield CheckChange(
            **dict(pair.name),
            name="verdict",
            before=None,
            after=None,
            verdict_before=pair.verdict,
            verdict_after=now,
            change=None,
            finding=why,
        )


def _row(pair: AuditedPair, before: Check, after: Check) -> CheckChange:
    change = _change(before, after)
    return CheckChange(
        **dict(pair.name),
        name=after.name,
        before=before.value.value,
        after=after.value.value,
        verdict_before=before.verdict,
        verdict_after=after.verdict,
        change=change,
        finding=None if change is None else _regression(before, after, change),
    )


def _regression(before: Check, after: Check, change: ValueChange) -> Finding | None:
    """Why a check is a regression; None where it is none.

    It is one where the verdict is worse and the value has changed for certain, and where the value alone is worse by
    more than is tolerated. An event that did not occur before and does now is one in any case.
    """
    worse = _ORDER.index(after.best) > _ORDER.index(before.best)
    fell = _worse("audit-verdict-worse", before=before.verdict, after=after.verdict) if worse else None
    limits = after.bounds.limits
    if not limits:  # an event
        return fell
    unchanged = 1.0 if change.kind == "ratio" else 0.0
    if before.exact and after.exact:
        low = high = change.value
    elif change.ci_low is None or change.ci_high is None:
        # Of a maximum the verdict alone tells; anything else without an interval is no ground to stand on.
        return fell if is_extreme(after.name) else None
    else:
        low, high = change.ci_low, change.ci_high
    if low <= unchanged <= high:
        return None
    if fell is not None:
        return fell
    rises = any(name.endswith("above") for name in limits)
    falls = any(name.endswith("below") for name in limits)
    if rises == falls or (low > unchanged) != rises:  # better, or limits on both sides, where only the verdict tells
        return None
    near = low if rises else high
    if change.kind == "ratio":
        factor = near if rises else 1 / near
        return _worse("audit-value-worse-by-factor", factor=factor) if factor > TOLERATED else None
    # Of what is no ratio, against the way that was left to the nearest limit.
    way = min(abs(limit - (before.value.value or 0.0)) for limit in limits.values())
    least = max((TOLERATED - 1) * way, _ONE_POWER if after.name.startswith(_EXPONENTS) else 0.0)
    return _worse("audit-value-worse-by", amount=abs(near)) if abs(near) > least else None


def _change(before: Check, after: Check) -> ValueChange | None:
    """The ratio of positive values, or the difference of others, with a 95 % interval where both have one."""
    a, b = before.value.value, after.value.value
    if a is None or b is None:
        return None
    info = CATALOG.get(after.name)
    ends = [end for value in (before.value, after.value) for end in (value.ci_low, value.ci_high) if end is not None]
    known = len(ends) == 4
    # Of exponents it is the difference that tells.
    scaled = info.positive if info is not None else not after.name.startswith(_EXPONENTS)
    if scaled and a > 0 and b > 0 and not (known and min(ends) <= 0):
        if not known:
            return ValueChange(kind="ratio", value=b / a, ci_low=None, ci_high=None)
        spread = math.hypot(math.log(ends[1] / ends[0]), math.log(ends[3] / ends[2])) / 2
        low, high = b / a * math.exp(-spread), b / a * math.exp(spread)
        return ValueChange(kind="ratio", value=b / a, ci_low=low, ci_high=high)
    if not known:
        return ValueChange(kind="difference", value=b - a, ci_low=None, ci_high=None)
    spread = math.hypot(ends[1] - ends[0], ends[3] - ends[2]) / 2
    return ValueChange(kind="difference", value=b - a, ci_low=b - a - spread, ci_high=b - a + spread)


def _changed(old: Audit, new: Audit) -> tuple[Change, ...]:
    """What differs in how the two audits were made, by name."""
    first, second = (
        dict(_flat({**audit.provenance.model_dump(mode="json"), "profile": audit.profile.name}))
        | dict(_flat({"options": audit.options.model_dump(mode="json")}))
        for audit in (old, new)
    )
    return tuple(
        Change(what=name, before=first.get(name), after=second.get(name))
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name) and name != "created"
    )


def _flat(content: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _gone(old: Audit, new: Audit) -> tuple[GoneCheck, ...]:
    """Checks of the baseline that this audit does not have."""
    there = {(pair.key, check.name) for pair in new.pairs for check in pair.checks}
    return tuple(
        GoneCheck(**dict(pair.name), name=check.name)
        for pair in old.pairs
        for check in pair.checks
        if (pair.key, check.name) not in there
    )


def _worse(code: str, **values: Value) -> Finding:
    return Finding(code=code, severity="fail", values=values)
