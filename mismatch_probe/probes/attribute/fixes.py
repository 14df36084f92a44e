"""Classes of a trainer's modules in FP32: what each buys, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mismatch_probe.engines.attribute.trainer import FIXES, set_name, single_name
from mismatch_probe.metrics import ladder
from mismatch_probe.metrics.fixes import Fix, cheapest
from mismatch_probe.probes.attribute.effects import effect_of
from mismatch_probe.probes.attribute.evidence import NOT_MEASURED, Evidence, Floats
from mismatch_probe.probes.attribute.names import TRAINER

NO_ANCHOR = "the run has no trainer in FP32 to set a target by: give --target"
NO_TARGET = "a trainer wholly in FP32 closes none of the gap, so no set of modules was looked for"


def fix_rows(evidence: Evidence, knobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Classes of modules in FP32: what each buys, sorted, and the cheapest set that meets the target.

    A class by itself is a setting as well; `knobs` are the rows of all settings by name.
    """
    base, parts = evidence.base, evidence.parts
    if FIXES not in parts and not evidence.readings.fix_classes:
        return {"rows": [], "target": None, "cheapest": None, "why": "no class of modules in FP32 was asked for"}
    if "target" not in parts.get(FIXES, ({},))[0] or not evidence.measured(TRAINER):
        return {"rows": [], "target": None, "cheapest": None, "why": evidence.why(FIXES)}
    singles = [((name,), parts.get(single_name(name))) for name in parts[FIXES][0]["classes"]]
    sets = parts[FIXES][0]["sets"]
    tried = singles + [(tuple(text.split("+")), parts.get(set_name(i))) for i, text in enumerate(sets)]
    plain = np.asarray(parts[TRAINER][1]["logprobs"], np.float64)
    fixes: list[Fix] = []
    rows: list[dict[str, Any]] = []
    for classes, part in tried:
        if part is None or "seconds" not in part[0]:
            why = "" if part is None else str(part[0].get("unavailable") or part[0].get("failed"))
            rows.append({"classes": list(classes), "status": "unavailable", "why": why or NOT_MEASURED})
            continue
        fix = Fix.of(classes, base.rollout_logprobs, parts[TRAINER], part)
        fixes.append(fix)
        if len(classes) == 1:
            effect = effect_of(knobs[single_name(classes[0])])
        else:
            effect = _effect(evidence, plain, np.asarray(part[1]["logprobs"], np.float64), base.rollout_logprobs)
        error = None
        if base.float32_logprobs is not None:
            own = _effect(evidence, plain, np.asarray(part[1]["logprobs"], np.float64), base.float32_logprobs)
            error = own["rms_ratio"]
        rows.append(
            {
                "classes": list(classes),
                "status": "measured",
                "why": "",
                **effect,
                "trainer_error_ratio": error,
                "added_time": fix.cost,
            }
        )
    rows.sort(key=lambda row: (row["status"] != "measured", _left(row)))
    target = parts[FIXES][0]["target"]
    best = None if target is None else cheapest(fixes, target)
    whole = None
    if base.float32_logprobs is not None:
        whole = _effect(evidence, plain, base.float32_logprobs, base.rollout_logprobs)["rms_ratio"]
    return {
        "rows": rows,
        "target": target,
        "whole_trainer_in_fp32": whole,
        "cheapest": None if best is None else {"classes": list(best.classes), "left": best.left, "cost": best.cost},
        "why": "" if target is not None else NO_TARGET if base.float32_logprobs is not None else NO_ANCHOR,
    }


def _left(row: Mapping[str, Any]) -> float:
    """What to sort by: rows without a ratio come last."""
    value = (row.get("rms_ratio") or {}).get("value")
    return math.inf if value is None else float(value)


def _effect(evidence: Evidence, plain: Floats, changed: Floats, other: Floats) -> dict[str, Any]:
    """What a change of the trainer does to its distance from others' log-probs, all `[N]`."""
    return ladder.change(plain - other, changed - other, evidence.base.tokens, seed=evidence.seed).as_dict()
