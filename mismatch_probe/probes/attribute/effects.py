"""What the passes say: the ladder from engine to trainer, each setting, settings of both sides, classes in FP32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mismatch_probe.engines.attribute.trainer import FIXES, set_name, single_name
from mismatch_probe.metrics.ladder import Change, Fix, change, cheapest, climb, tested_together
from mismatch_probe.probes.attribute.passes import AT_ROLLOUT, CAST, SAME_DTYPE, Evidence, Floats
from mismatch_probe.probes.attribute.settings import PREFILL, REPLAY, TRAINER, Setting
from mismatch_probe.results.attribution import (
    WHERE,
    BothSides,
    Fixes,
    FixResult,
    Ladder,
    LadderPass,
    LadderRung,
    PassKey,
    RungKey,
    SettingResult,
    Where,
)
from mismatch_probe.results.finding import Finding

# Settings that exist on both sides.
BOTH_SIDES = ("fp32-head", "float16", "kv-fp8")


def setting_results(evidence: Evidence) -> tuple[tuple[SettingResult, ...], tuple[BothSides, ...]]:
    """Every setting of both sides, measured or not, and those of both sides together: one family of tests."""
    rows = {setting.name: _result(evidence, setting) for setting in evidence.store.settings}
    return judged(rows, [_both_sides(evidence, key, rows) for key in BOTH_SIDES])


def judged(
    rows: Mapping[str, SettingResult], both: Sequence[BothSides]
) -> tuple[tuple[SettingResult, ...], tuple[BothSides, ...]]:
    """With the tests of all adjusted together (Holm 1979). A variant on one side has those of its setting."""
    family = {name: row.effect for name, row in rows.items() if row.effect is not None}
    family |= {pair.key: pair.variants["both"] for pair in both if pair.variants}
    found = dict(zip(family, tested_together(list(family.values())), strict=True))
    settings = tuple(row.model_copy(update={"effect": found.get(name)}) for name, row in rows.items())
    return settings, tuple(_with_tests(pair, found) for pair in both)


def _with_tests(pair: BothSides, found: Mapping[str, Change]) -> BothSides:
    if not pair.variants:
        return pair
    variants: dict[Where, Change] = {
        "neither": pair.variants["neither"],
        "rollout": _tested_as(pair.variants["rollout"], found[f"rollout-{pair.key}"]),
        "trainer": _tested_as(pair.variants["trainer"], found[f"trainer-{pair.key}"]),
        "both": found[pair.key],
    }
    hurts = tuple(where for where in WHERE if variants[where].alters(larger=True))
    return pair.model_copy(update={"variants": variants, "hurts": hurts})


def _tested_as(variant: Change, tested: Change) -> Change:
    return replace(variant, p_holm=tested.p_holm, differs=tested.differs)


def _result(evidence: Evidence, setting: Setting) -> SettingResult:
    """A setting: measured, or why it is not."""
    row = SettingResult(
        name=setting.name,
        side=setting.side,
        key=setting.key,
        change=setting.change,
        options=setting.options,
        environment=dict(setting.environment),
        status="measured",
        why="",
    )
    if not evidence.measured(setting.name):
        why = setting.why_missing(evidence.pair.context)
        if why:
            return row.model_copy(update={"status": "unsupported", "why": why})
        if setting not in evidence.store.chosen:
            text = "slow: it runs with --settings all, or by its name" if setting.slow else "not asked for"
            return row.model_copy(update={"status": "skipped", "why": text})
    if setting.name not in evidence.parts:
        return row.model_copy(update={"status": "skipped", "why": evidence.why(setting.name)})
    if not evidence.measured(setting.unchanged):
        why = f"the pass without it, {setting.unchanged}: {evidence.why(setting.unchanged)}"
        return row.model_copy(update={"status": "skipped", "why": why})
    if not evidence.measured(setting.name):
        status = evidence.status(setting.name)
        return row.model_copy(update={"status": status, "why": evidence.why(setting.name)})
    return row.model_copy(update=_effect(evidence, setting))


def _effect(evidence: Evidence, setting: Setting) -> dict[str, Any]:
    """Fields of a measured setting: what it does to the gap, and what it costs."""
    pair, part, before = evidence.pair, evidence.parts[setting.name], evidence.parts[setting.unchanged]
    mask = np.zeros(len(pair.rollout_logprobs), np.bool_)
    starts = pair.starts()
    lengths = part[1].get("tokens", np.diff(starts)[part[1]["index"]])
    for sequence, length in zip(part[1]["index"], lengths, strict=True):
        mask[starts[sequence] : starts[sequence] + length] = True
    changed, plain = (np.asarray(p[1]["logprobs"], np.float64) for p in (part, before))
    same = len(plain) == len(changed)
    plain = plain if same else plain[mask]  # the pass without it has all tokens, or the same ones
    if setting.side == "rollout":
        other = pair.trainer_logprobs[mask]
        gaps = (other - plain, other - changed)
    else:
        other = pair.rollout_logprobs[mask]
        gaps = (plain - other, changed - other)
    peaks = (part[0].get("peak_bytes"), before[0].get("peak_bytes"))
    return {
        "effect": change(*gaps, pair.tokens.where(mask), seed=evidence.seed),
        "n_tokens": int(mask.sum()),
        "n_nonfinite": int((~np.isfinite(changed)).sum()),
        "time_ratio": part[0]["seconds"] / before[0]["seconds"] if same else None,
        "peak_gib": None if peaks[0] is None else peaks[0] / 2**30,
        "memory_ratio": peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        "notes": _notes(part[0].get("identity", {}), before[0].get("identity", {}), setting),
    }


def _notes(after: Mapping[str, Any], before: Mapping[str, Any], setting: Setting) -> tuple[Finding, ...]:
    """What changed along with a setting, or kept it from doing anything."""
    for name in ("attention_backends", "attention"):
        if after.get(name) != before.get(name) and not setting.key.startswith("attention"):
            values = {"before": _listed(before.get(name)), "after": _listed(after.get(name))}
            return (Finding(code="attention-changed-too", severity="note", where=setting.name, values=values),)
    if setting.key == "prefix-cache" and "block_size" in after:
        size = {"tokens": int(after["block_size"])}
        return (Finding(code="prefix-cache-in-blocks", severity="note", where=setting.name, values=size),)
    return ()


def _listed(names: Sequence[str] | str | None) -> str:
    return names if isinstance(names, str) else ", ".join(names or ()) or "none"


def _both_sides(evidence: Evidence, key: str, rows: Mapping[str, SettingResult]) -> BothSides:
    """A setting on neither side, one, and both."""
    rollout, trainer = f"rollout-{key}", f"trainer-{key}"
    sides = [evidence.logprobs(name) for name in (REPLAY, rollout, TRAINER, trainer)]
    if any(side is None for side in sides):
        missing = rollout if sides[1] is None else trainer
        why = rows[missing].why or evidence.why(missing)
        return BothSides(key=key, variants={}, best=None, hurts=(), why=why)
    plain_b, changed_b, plain_a, changed_a = (np.asarray(side) for side in sides)
    # All of passes that were run again, so that the four have one reference.
    neither = plain_a - plain_b
    gaps: dict[Where, Any] = {
        "neither": neither,
        "rollout": plain_a - changed_b,
        "trainer": changed_a - plain_b,
        "both": changed_a - changed_b,
    }
    variants = {where: evidence.change(neither, gap) for where, gap in gaps.items()}
    known = [(found.rms.value, where) for where, found in variants.items() if found.rms.value is not None]
    best = min(known, key=lambda pair: pair[0])[1] if known else None
    return BothSides(key=key, variants=variants, best=best, hurts=(), why="")


@dataclass(frozen=True)
class _Pass:
    """A pass on the ladder.

    Attributes:
        key: Which.
        rung: What changes on the rung that leads to it; of the first pass nothing does.
        logprobs: `[N]` nats; None where it is not there.
        name: Of its file; empty where it is the comparison's own.
    """

    key: PassKey
    rung: RungKey
    logprobs: Floats | None
    name: str = ""


def ladder_of(evidence: Evidence) -> Ladder:
    """The rungs from the rollout's log-probs to the trainer's, and each pass's error against the trainer in FP32."""
    pair, passes = evidence.pair, _passes(evidence)
    missing = next((found.name for found in passes if found.logprobs is None), None)
    if missing is not None:
        return Ladder(rungs=(), passes=(), n_nonfinite=0, squares_over_gap=None, why=evidence.why(missing))
    logprobs = [np.asarray(found.logprobs) for found in passes]
    rungs = climb(logprobs, pair.tokens, seed=evidence.seed)
    rows = tuple(
        LadderRung(
            key=after.rung,
            before=before.key,
            after=after.key,
            rms=rung.rms,
            mean=rung.mean,
            contribution=rung.contribution,
        )
        for (before, after), rung in zip(pairwise(passes), rungs, strict=True)
    )
    reference = pair.float32_logprobs
    errors = [None if reference is None else evidence.size(own - reference).rms for own in logprobs]
    finite = np.isfinite(np.stack(logprobs)).all(axis=0)
    gap = (logprobs[-1] - logprobs[0])[finite]
    squares = sum((rung.rms.value or 0.0) ** 2 for rung in rungs)
    return Ladder(
        rungs=rows,
        passes=tuple(LadderPass(key=p.key, error_rms=error) for p, error in zip(passes, errors, strict=True)),
        n_nonfinite=int((~finite).sum()),
        squares_over_gap=float(squares / np.mean(gap**2)) if gap.any() else None,
        why="",
    )


def _passes(evidence: Evidence) -> list[_Pass]:
    """From the engine to the trainer."""
    pair = evidence.pair
    at: RungKey = "engine"
    last: RungKey = "layout"
    found = [
        _Pass("sampled", "prefill", pair.rollout_logprobs),
        _Pass("prefill", "prefill", evidence.logprobs(PREFILL), PREFILL),
    ]
    if pair.context.mixed:
        found.append(_Pass("rollout-dtype", at, evidence.logprobs(SAME_DTYPE), SAME_DTYPE))
        at = "dtype"
    found.append(_Pass("rollout-batching", at, evidence.logprobs(AT_ROLLOUT), AT_ROLLOUT))
    if pair.context.trainer_mode == "autocast":
        found.append(_Pass("cast", "layout", evidence.logprobs(CAST), CAST))
        last = "mode"
    return [*found, _Pass("trained", last, pair.trainer_logprobs)]


NO_REFERENCE = "the run has no trainer in FP32 to set a target by: give --target"
NO_TARGET = "a trainer wholly in FP32 closes none of the gap, so no set of modules is looked for"


def fixes_of(evidence: Evidence, settings: Sequence[SettingResult]) -> Fixes:
    """Classes of modules in FP32, the smallest gap first, and the cheapest set that meets the target.

    A class by itself is a setting as well.
    """
    pair, parts = evidence.pair, evidence.parts
    nothing = Fixes(rows=(), target=None, whole_trainer_in_fp32=None, cheapest=None, why="")
    if FIXES not in parts and not evidence.store.fix_classes:
        return nothing.model_copy(update={"why": "no class of modules in FP32 was asked for"})
    if "target" not in parts.get(FIXES, ({},))[0] or not evidence.measured(TRAINER):
        return nothing.model_copy(update={"why": evidence.why(FIXES)})
    tried = {single_name(name): (name,) for name in parts[FIXES][0]["classes"]}
    tried |= {set_name(index): tuple(text.split("+")) for index, text in enumerate(parts[FIXES][0]["sets"])}
    effects = {row.name: row.effect for row in settings}
    plain = np.asarray(parts[TRAINER][1]["logprobs"], np.float64)
    reference = pair.float32_logprobs
    fixes: list[Fix] = []
    rows: list[FixResult] = []
    for name, classes in tried.items():
        if name not in parts or "seconds" not in parts[name][0]:
            rows.append(FixResult(classes=classes, status=evidence.status(name), why=evidence.why(name)))
            continue
        fix = Fix.of(classes, pair.rollout_logprobs, parts[TRAINER], parts[name])
        fixes.append(fix)
        own = np.asarray(parts[name][1]["logprobs"], np.float64)
        effect = effects.get(name) or evidence.change(plain - pair.rollout_logprobs, own - pair.rollout_logprobs)
        error = None if reference is None else evidence.change(plain - reference, own - reference).rms_ratio
        rows.append(
            FixResult(
                classes=classes,
                status="measured",
                why="",
                effect=effect,
                trainer_error_ratio=error,
                added_time=fix.cost,
            )
        )
    rows.sort(key=lambda row: (row.status != "measured", _left(row)))
    target = parts[FIXES][0]["target"]
    whole = None
    if reference is not None:
        whole = evidence.change(plain - pair.rollout_logprobs, reference - pair.rollout_logprobs).rms_ratio
    return Fixes(
        rows=tuple(rows),
        target=target,
        whole_trainer_in_fp32=whole,
        cheapest=None if target is None else cheapest(fixes, target),
        why="" if target is not None else NO_TARGET if reference is not None else NO_REFERENCE,
    )


def _left(row: FixResult) -> float:
    """What to sort by: rows without a ratio come last."""
    value = None if row.effect is None else row.effect.rms_ratio.value
    return math.inf if value is None else value
