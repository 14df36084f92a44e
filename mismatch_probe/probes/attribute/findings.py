"""What an attribution comes to, as findings. What is said of rounding and of places follows `metrics.conclusions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mismatch_probe.metrics.conclusions import LEAST, Conclusion, Conclusions, Left, Rounding, arises, conclude
from mismatch_probe.metrics.inside import THRESHOLD
from mismatch_probe.metrics.ladder import Change
from mismatch_probe.results.attribution import NO_GAP, Attribution
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.types import MetricValue

_ROUNDING = {
    "cause": "rounding-explains",
    "part": "rounding-explains-part",
    "no cause": "rounding-does-not-explain",
    "fault first": "fault-before-rounding",
    "unknown": "rounding-not-known",
}
_ROUNDING_SEVERITY: dict[str, Severity] = {"cause": "info", "part": "warn", "no cause": "fail", "fault first": "warn"}


def findings_of(document: Attribution) -> tuple[Finding, ...]:
    """The answer in two findings: where the gap arises, and a fault or whether rounding explains it. Then the other of
    those, what closes part of the gap, the largest part first, and the rest.
    """
    concluded = conclude(
        document.layers.dtypes,
        (document.rollout_dtype, document.trainer_dtype),
        Left(document.left_in_fp32.fraction.value, document.left_in_fp32.rms.value),
        routers=document.experts is not None,
    )
    first = _arises(document)
    if first.code in NO_GAP:
        return (first, *_inside(document, concluded, explains=True), *_limits(document))
    # A fault of which FP32 leaves next to nothing does not make this gap.
    inside = [*_inside(document, concluded, explains=concluded.rounding.code == "cause")]
    if concluded.rounding.elsewhere:
        inside.append(Finding(code="differs-outside-modules", severity="fail"))
    faults = [found for found in inside if found.severity == "fail"]
    others = [found for found in inside if found.severity != "fail"]
    rounding = _rounding(document, concluded.rounding)
    return (first, *faults, rounding, *_changes(document), *others, *_fixes(document), *_limits(document))


def _arises(document: Attribution) -> Finding:
    """Where the gap arises, never more than the intervals allow."""
    rms = document.gap.rms
    if rms.value is None:
        return Finding(code="gap-not-known", severity="note", values={"why": rms.why})
    if rms.value == 0:
        return Finding(code="no-gap", severity="info", values={"tokens": document.n_tokens})
    rungs = {rung.key: rung.contribution for rung in document.ladder.rungs}
    found = arises({str(key): value for key, value in rungs.items()})
    if found.code == "nowhere":
        why = document.ladder.why or next((value.why for value in rungs.values()), "")
        return Finding(code="no-ladder", severity="note", values={"why": why})
    code = {"one": "arises-at-rung", "undecided": "arises-undecided", "estimate": "arises-by-estimate"}[found.code]
    values: dict[str, Value] = {
        "rungs": found.rungs,
        "contributions": {str(key): value for key, value in rungs.items() if key in found.rungs},
        "layout": document.trainer_layout,
        "rollout_dtype": document.rollout_dtype,
        "trainer_dtype": document.trainer_dtype,
    }
    return Finding(code=code, severity="info", where=found.rungs[0], values=values)


def _rounding(document: Attribution, rounding: Rounding) -> Finding:
    """Whether rounding explains the gap."""
    left = document.left_in_fp32
    measured = rounding.left is not None
    values: dict[str, Value] = {"left": left.fraction if measured else None, "left_rms": left.rms if measured else None}
    if rounding.code == "unknown":
        values["why"] = "" if measured else left.fraction.why
    severity = _ROUNDING_SEVERITY.get(rounding.code, "note")
    return Finding(code=_ROUNDING[rounding.code], severity=severity, values=values)


def _inside(document: Attribution, concluded: Conclusions, *, explains: bool) -> Iterator[Finding]:
    """What both models' insides show: one finding for all dtypes that show the same. `explains`: whether rounding
    explains the gap, so that no fault makes it.
    """
    groups: dict[object, dict[str, Conclusion]] = {}
    for dtype, found in concluded.dtypes.items():
        same = () if found.code == "quiet" else (found.place, found.layers, found.ends, found.seen_in)
        groups.setdefault((found.code, same), {})[dtype] = found
    about = {document.rollout_dtype, document.trainer_dtype, "float32"}
    for group in groups.values():
        found, dtypes = next(iter(group.values())), tuple(group)
        if found.code == "not compared":
            for dtype in dtypes:
                why = {"why": document.layers.dtypes[dtype].why}
                yield Finding(code="layers-not-compared", severity="note", where=dtype, values=why)
            continue
        makes_it = not explains and bool(about & group.keys())
        severity: Severity = ("fail" if makes_it else "warn") if found.is_fault else "info"
        values: dict[str, Value] = {
            "dtypes": dtypes,
            "scores": {dtype: one.score for dtype, one in group.items()},
            "threshold": THRESHOLD,
        }
        if found.code not in ("quiet", "not finite"):
            values |= _place(found)
        if found.code == "not finite":
            values["name"] = found.located.name
        yield Finding(code=_code(found), severity=severity, where=", ".join(dtypes), values=values)


def _code(found: Conclusion) -> str:
    if found.code == "fault":
        everywhere = found.located.verdict == "everywhere"
        module = "module-stands-out-everywhere" if everywhere else "module-stands-out"
        return {"end": "layer-code-stands-out", "between": "input-stands-out"}.get(found.located.kind, module)
    if found.code == "step":
        return "step-of-routed-layer" if found.routers else "step-adds-up" if found.ends else "step-stands-out"
    codes = {"not finite": "tensor-not-finite", "hidden": "hidden-by-rounding", "absent": "absent-in-dtype"}
    return codes.get(found.code, "nothing-stands-out")


def _place(found: Conclusion) -> dict[str, Value]:
    """What stands out, or does where it can be seen."""
    located, first = found.located, found.layers[0] if found.layers else found.located.layer
    return {
        "verdict": located.verdict,
        "kind": located.kind,
        "name": located.name,
        "layer": first,
        "more_layers": max(0, len(found.layers) - 1),
        "seen_in": found.seen_in,
    }


def _changes(document: Attribution) -> list[Finding]:
    """Settings that close part of the gap, tested as one family, by more than an engine differs from itself."""
    found: list[Finding] = []
    noise = {"rollout": document.self_noise.rollout, "trainer": document.self_noise.trainer}
    for row in document.settings:
        if row.effect is not None and _helps(row.effect, [noise[row.side]]):
            values: dict[str, Value] = {"closed": row.effect.closed, "change": row.change, "side": row.side}
            found.append(Finding(code="setting-closes-gap", severity="info", where=row.name, values=values))
    for pair in document.both_sides:
        if pair.best == "both" and _helps(pair.variants["both"], list(noise.values())):
            values = {"closed": pair.variants["both"].closed}
            found.append(Finding(code="both-sides-close-gap", severity="info", where=pair.key, values=values))
    found.sort(key=lambda one: one.metric("closed").value or 0.0, reverse=True)
    if not found:
        measured = [row.effect for row in document.settings if row.effect is not None]
        untested = any(effect.shift.value for effect in measured) and all(e.p_holm is None for e in measured)
        code = "settings-not-tested" if untested else "no-setting-closes-gap"
        severity: Severity = "note" if untested else "info"
        found = [Finding(code=code, severity=severity, values={"settings": len(measured)})] if measured else []
    return [*found, *_experts(document)]


def _helps(effect: Change, noise: Sequence[MetricValue]) -> bool:
    moved = (effect.shift.value or 0.0) > max((value.value or 0.0) for value in noise)
    return effect.alters(larger=False) and moved and (effect.closed.value or 0.0) >= LEAST


def _experts(document: Attribution) -> Iterator[Finding]:
    experts = document.experts
    if experts is None or experts.engine_routes is None:
        return
    ratio = experts.engine_routes.rms_ratio
    values: dict[str, Value] = {
        "flipped": experts.flipped_tokens,
        "contribution": experts.contribution,
        "rms_ratio": ratio,
        "closed": experts.engine_routes.closed,
    }
    helps = ratio.value is not None and ratio.ci_high is not None and ratio.ci_high < 1
    yield Finding(code="routes-close-gap" if helps else "routers-compared", severity="info", values=values)


def _fixes(document: Attribution) -> Iterator[Finding]:
    """What classes of modules in FP32 buy."""
    fixes = document.fixes
    tried = {
        row.classes: row.effect.rms_ratio
        for row in fixes.rows
        if row.effect is not None and row.effect.rms_ratio.value is not None
    }
    if not tried:
        return
    values: dict[str, Value] = {"target": fixes.target, "whole": fixes.whole_trainer_in_fp32}
    if fixes.target is None:
        yield Finding(code="fp32-trainer-closes-nothing", severity="info", values=values)
    elif fixes.cheapest is not None:
        best = fixes.cheapest
        values |= {"classes": best.classes, "left": best.left, "added_time": best.cost}
        yield Finding(code="fp32-modules-meet-target", severity="info", values=values)
    else:
        closest = min(tried, key=lambda classes: tried[classes].value or 0.0)
        values |= {"classes": closest, "left": tried[closest]}
        yield Finding(code="fp32-modules-miss-target", severity="info", values=values)


def _limits(document: Attribution) -> Iterator[Finding]:
    """What limits the numbers."""
    rms = document.gap.rms
    # Hundreds of intervals share this reason, so that it is given once.
    if rms.why and rms.ci_low is not None:
        yield Finding(code="attribution-intervals-limited", severity="note", values={"why": rms.why})
    for code, count in (("nonfinite", document.n_nonfinite), ("impossible", document.n_impossible)):
        if count:
            yield Finding(code=f"attribution-tokens-{code}", severity="note", values={"tokens": count})
    for name, why in document.failed.items():
        yield Finding(code="attribution-pass-failed", severity="warn", where=name, values={"why": why})
