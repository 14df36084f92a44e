"""`attribution.json`: what the passes of a run say about where its gap arises.

Shape legend: `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.attribute.rollout import ROUTES
from mismatch_probe.engines.attribute.variants import UNKNOWN
from mismatch_probe.metrics.conclusions import LEAST, Conclusion, Conclusions, Left, Rounding, arises, conclude
from mismatch_probe.metrics.inside import THRESHOLD, Inside, inside_of
from mismatch_probe.metrics.ladder import Change, contribution_of
from mismatch_probe.probes.attribute.effects import fixes_of, ladder_of, setting_results
from mismatch_probe.probes.attribute.passes import FOLLOWED, Evidence, inside_name
from mismatch_probe.probes.attribute.settings import REPLAY, TRAINER
from mismatch_probe.results.attribution import (
    NO_GAP,
    Attribution,
    Experts,
    Layers,
    LeftInFp32,
    RouterLayer,
    SelfNoise,
    SettingResult,
)
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.types import MetricValue

NO_WIDE = "it needs layers in float32, and a trainer in float32"
_ROUNDING = {
    "cause": "rounding-explains",
    "part": "rounding-explains-part",
    "no cause": "rounding-does-not-explain",
    "fault first": "fault-before-rounding",
    "unknown": "rounding-not-known",
}
_ROUNDING_SEVERITY: dict[str, Severity] = {"cause": "info", "part": "warn", "no cause": "fail", "fault first": "warn"}


def attribution_of(evidence: Evidence) -> Attribution:
    """The whole document."""
    pair, context = evidence.pair, evidence.pair.context
    usable = np.isfinite(pair.rollout_logprobs) & np.isfinite(pair.trainer_logprobs)
    settings, both_sides = setting_results(evidence)
    found = Attribution(
        **Attribution.stamp(),
        model=pair.run.manifest.model.name,
        device=context.device,
        rollout_pass=str(pair.rollout),
        trainer_pass=str(pair.trainer),
        rollout_dtype=context.rollout_dtype,
        trainer_dtype=context.trainer_dtype,
        trainer_mode=context.trainer_mode,
        trainer_layout=context.trainer_layout,
        n_tokens=len(pair.rollout_logprobs),
        n_sequences=len(pair.sequences),
        n_nonfinite=int((~usable).sum()) - pair.n_impossible,
        n_impossible=pair.n_impossible,
        gap=evidence.size(evidence.gap),
        self_noise=SelfNoise(
            rollout=_self_noise(evidence, REPLAY, pair.rollout_logprobs),
            trainer=_self_noise(evidence, TRAINER, pair.trainer_logprobs),
        ),
        ladder=ladder_of(evidence),
        settings=settings,
        both_sides=both_sides,
        layers=_layers(evidence, settings),
        left_in_fp32=_left_in_fp32(evidence),
        fixes=fixes_of(evidence, settings),
        experts=_experts(evidence),
        failed={name: part[0]["failed"] for name, part in evidence.parts.items() if "failed" in part[0]},
        findings=(),
    )
    return found.model_copy(update={"findings": findings_of(found)})


def _self_noise(evidence: Evidence, name: str, own: NDArray[np.float64]) -> MetricValue:
    """RMS by which a side differs from itself, run again without a change."""
    again = evidence.logprobs(name)
    return MetricValue(None, why=evidence.why(name)) if again is None else evidence.size(again - own).rms


def _left_in_fp32(evidence: Evidence) -> LeftInFp32:
    pair, name = evidence.pair, evidence.store.wide
    engine = evidence.logprobs(name)
    if engine is None or pair.float32_logprobs is None:
        none = MetricValue(None, why=evidence.why(name) if name and engine is None else NO_WIDE)
        return LeftInFp32(rms=none, fraction=none)
    found = evidence.change(evidence.gap, pair.float32_logprobs - engine)
    ratio = found.rms_ratio
    value, low, high = (None if end is None else end**2 for end in (ratio.value, ratio.ci_low, ratio.ci_high))
    return LeftInFp32(rms=found.rms, fraction=MetricValue(value, low, high, ratio.why))


def _layers(evidence: Evidence, settings: tuple[SettingResult, ...]) -> Layers:
    """Both models by dtype, and how far the mode that layers are recorded in is from the sampled pass."""
    eager = evidence.pair.eager
    name = "rollout-compiled" if eager else "rollout-eager"
    effect = next(setting.effect for setting in settings if setting.name == name)
    return Layers(
        dtypes={dtype: _inside(evidence, dtype) for dtype in evidence.store.layer_dtypes},
        threshold=THRESHOLD,
        rollout_eager=eager,
        eager_vs_compiled_shift=None if effect is None else effect.shift,
        why=evidence.store.why_no_layers,
    )


def _inside(evidence: Evidence, dtype: str) -> Inside:
    part = evidence.parts.get(inside_name(dtype))
    if part is None or "records" not in part[0]:
        return Inside(evidence.why(inside_name(dtype)))
    return inside_of(*part, dtype)


def _experts(evidence: Evidence) -> Experts | None:
    """How far the routers of both sides agree, and what their disagreement makes; None for a dense model."""
    pair, parts = evidence.pair, evidence.parts
    if not pair.context.experts:
        return None
    if pair.context.why_no_routes:
        return Experts(why=pair.context.why_no_routes)
    for name in (ROUTES, FOLLOWED):
        if name not in parts or "routes" not in parts[name][1]:
            return Experts(why=evidence.why(name))
    engine, trainer = parts[ROUTES][1], parts[FOLLOWED][1]
    theirs, ours = np.sort(engine["routes"], 2), np.sort(trainer["routes"], 2)
    # Where two of the engine's experts tie for the last place nobody can say which it took.
    flips = ((theirs != ours).any(2) & (theirs != UNKNOWN).all(2))[:, _predicting_rows(evidence)]
    prefill = np.asarray(engine["logprobs"], np.float64)
    before, after = (np.asarray(trainer[key], np.float64) - prefill for key in ("own", "logprobs"))
    flipped = flips.any(0)
    layers = parts[ROUTES][0]["layers"]
    return Experts(
        why="",
        layers=tuple(
            RouterLayer(layer=int(layer), agreement=float(1 - flips[k].mean())) for k, layer in enumerate(layers)
        ),
        flipped_tokens=float(flipped.mean()),
        contribution=contribution_of(before, flipped, pair.tokens, seed=evidence.seed),
        own_routes=evidence.size(before),
        engine_routes=evidence.change(before, after),
    )


def _predicting_rows(evidence: Evidence) -> NDArray[np.int64]:
    """`[N]` row, among the `R` of all sequences with their prompts, whose logits predict each response token."""
    rows, start = [], 0
    for sequence in evidence.pair.sequences:
        first = start + len(sequence.prompt_token_ids) - 1
        rows.append(np.arange(first, first + len(sequence.response_token_ids)))
        start += sequence.length
    return np.concatenate(rows)


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
        return (first, *_inside_findings(document, concluded, explains=True), *_limits(document))
    # A fault of which FP32 leaves next to nothing does not make this gap.
    inside = [*_inside_findings(document, concluded, explains=concluded.rounding.code == "cause")]
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


def _inside_findings(document: Attribution, concluded: Conclusions, *, explains: bool) -> Iterator[Finding]:
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
    return [*found, *_expert_findings(document)]


def _helps(effect: Change, noise: Sequence[MetricValue]) -> bool:
    moved = (effect.shift.value or 0.0) > max((value.value or 0.0) for value in noise)
    return effect.alters(larger=False) and moved and (effect.closed.value or 0.0) >= LEAST


def _expert_findings(document: Attribution) -> Iterator[Finding]:
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
