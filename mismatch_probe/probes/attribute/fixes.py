"""Classes of a trainer's modules in FP32: what each leaves of the gap, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mismatch_probe.engines.attribute.trainer import FIXES, set_name, single_name
from mismatch_probe.metrics.fixes import Fix, cheapest
from mismatch_probe.probes.attribute.evidence import Evidence
from mismatch_probe.probes.attribute.names import TRAINER
from mismatch_probe.results.attribution import Fixes, FixResult, SettingResult

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
