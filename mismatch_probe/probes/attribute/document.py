"""`attribution.json`: what the readings of a run say about where its gap comes from."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from mismatch_probe.metrics import ladder
from mismatch_probe.metrics.conclusions import Left, conclude
from mismatch_probe.probes.attribute.causes import ranked_causes
from mismatch_probe.probes.attribute.depth import layer_rows
from mismatch_probe.probes.attribute.effects import judge, knob_row, two_sided_rows
from mismatch_probe.probes.attribute.evidence import Evidence, values
from mismatch_probe.probes.attribute.experts import expert_rows
from mismatch_probe.probes.attribute.fixes import fix_rows
from mismatch_probe.probes.attribute.names import REPLAY, TRAINER
from mismatch_probe.probes.attribute.rungs import ladder_rows
from mismatch_probe.types import MetricValue

SCHEMA_VERSION = 1
NO_WIDE = "it takes layers in float32, and a trainer in float32"


def attribution_document(evidence: Evidence) -> dict[str, Any]:
    """The whole of it."""
    base, context = evidence.base, evidence.base.context
    usable = np.isfinite(base.rollout_logprobs) & np.isfinite(base.trainer_logprobs)
    knobs = {knob.name: knob_row(evidence, knob) for knob in evidence.readings.knobs}
    two_sided = two_sided_rows(evidence, knobs)
    judge(knobs, two_sided)
    layers, experts, left = layer_rows(evidence, knobs), expert_rows(evidence), _left_in_fp32(evidence)
    concluded = conclude(
        layers["dtypes"],
        (context.rollout_dtype, context.trainer_dtype),
        Left(left["share"]["value"], left["rms"]["value"]),
        routers=bool(context.experts),
    )
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": version("mismatch-probe"),
        "model": base.run.manifest.model.name,
        "device": context.device,
        "rollout_pass": base.rollout.pass_id,
        "trainer_pass": base.trainer.pass_id,
        "rollout_dtype": context.rollout_dtype,
        "trainer_dtype": context.trainer_dtype,
        "trainer_mode": context.trainer_mode,
        "n_tokens": len(base.rollout_logprobs),
        "n_sequences": len(base.sequences),
        "n_nonfinite": int((~usable).sum()) - base.n_impossible,
        "n_impossible": base.n_impossible,
        "gap": values(ladder.gap(evidence.gap, base.tokens, seed=evidence.seed)),
        "nulls": _nulls(evidence),
        "ladder": ladder_rows(evidence),
        "knobs": list(knobs.values()),
        "two_sided": two_sided,
        "layers": layers,
        "left_in_fp32": left,
        "conclusions": concluded.as_dict(),
        "fixes": fix_rows(evidence, knobs),
        "experts": experts,
        "failed": {name: part[0]["failed"] for name, part in evidence.parts.items() if "failed" in part[0]},
    }
    return document | {"causes": ranked_causes(document)}


def _left_in_fp32(evidence: Evidence) -> dict[str, Any]:
    """The RMS of the gap with both sides in FP32, over the same tokens, and the share of E[d²] that it leaves."""
    base, name = evidence.base, evidence.readings.wide
    engine = evidence.reading(name)
    if engine is None or base.float32_logprobs is None:
        none = MetricValue(None, why=evidence.why(name) if name and engine is None else NO_WIDE).as_dict()
        return {"rms": none, "share": none}
    found = ladder.change(evidence.gap, base.float32_logprobs - engine, base.tokens, seed=evidence.seed).as_dict()
    ratio = found["rms_ratio"]
    ends = {key: None if ratio.get(key) is None else ratio[key] ** 2 for key in ("value", "ci_low", "ci_high")}
    return {"rms": found["rms"], "share": ratio | ends}


def _nulls(evidence: Evidence) -> dict[str, Any]:
    """The RMS by which each side differs from itself, run again without a change: what no setting can be told from."""
    base = evidence.base
    sides = {"rollout": (REPLAY, base.rollout_logprobs), "trainer": (TRAINER, base.trainer_logprobs)}
    found: dict[str, Any] = {}
    for side, (name, own) in sides.items():
        again = evidence.reading(name)
        if again is None:
            found[side] = {"value": None, "ci_low": None, "ci_high": None, "why": evidence.why(name)}
        else:
            found[side] = ladder.gap(again - own, base.tokens, seed=evidence.seed)["rms"].as_dict()
    return found
