"""An attribution in miniature: a rung that undoes, settings of every status, a long model, fixes, and routers."""

from __future__ import annotations

from typing import Any

from mismatch_probe.metrics.conclusions import Left, conclude
from tests.report.conftest import HOSTILE

LAYERS = 16


def metric(value: float | None, share: float = 0.1, why: str = "") -> dict[str, Any]:
    ends = (None, None) if value is None else (value - share * abs(value), value + share * abs(value))
    return {"value": value, "ci_low": ends[0], "ci_high": ends[1]} | ({"why": why} if why else {})


def bare(value: float | None, why: str) -> dict[str, Any]:
    """A value that has no interval."""
    return {"value": value, "ci_low": None, "ci_high": None, "why": why}


def effect(ratio: float, share: float = 0.05) -> dict[str, Any]:
    return {
        "rms": metric(0.065 * ratio, share),
        "k3": metric(0.002 * ratio**2, share),
        "rms_ratio": metric(ratio, share),
        "k3_ratio": metric(ratio**2, 2 * share),
        "shift": metric(0.03, share),
        "p_value": 0.01,
    }


def judged(p: float | None) -> dict[str, Any]:
    """What all tests together say of a setting."""
    return {"p_holm": p, "differs": None if p is None else p < 0.05}


def knob(side: str, key: str, ratio: float | None = None, **changes: Any) -> dict[str, Any]:
    row = {
        "name": f"{side}-{key}",
        "side": side,
        "key": key,
        "change": f"{key} changed",
        "action": f"mind {key}",
        "status": "unavailable" if ratio is None else "measured",
        "why": f"no {key} here" if ratio is None else "",
    }
    if ratio is not None:
        row |= effect(ratio) | judged(0.02)
        row |= {"n_tokens": 1949, "time_ratio": 1.5, "peak_gib": 2.25, "memory_ratio": 1.1, "note": ""}
    return row | changes


def unchanged() -> dict[str, Any]:
    one, none = bare(1.0, "no token changed"), bare(0.0, "no token changed")
    return {"rms_ratio": one, "k3_ratio": one, "shift": none, "p_value": None, **judged(None)}


def _ladder() -> dict[str, Any]:
    steps = (("decode → prefill", 0.7), ("vLLM → Hugging Face", 0.6), ("batched as it is trained", -0.3))
    rungs = [
        {"from": "a", "to": "b", "change": text, "rms": metric(0.06), "mean": metric(-1e-3), "share": metric(share)}
        for text, share in steps
    ]
    levels = ("sampled", "prefilled", "batched alike", "trained")
    anchor = [{"level": name, "error_rms": metric(0.05 + 0.001 * i)} for i, name in enumerate(levels)]
    return {"rungs": rungs, "anchor": anchor, "n_nonfinite": 0, "squares_over_gap": 2.7, "why": ""}


def _inside(scale: float) -> dict[str, Any]:
    layers = [
        {
            "layer": i,
            "relative_error": scale * (1 + i),
            "step": scale,
            "step_expected": 1.4 * scale,
            "score": 0.9 if i == 7 else 0.7,
            "lens_kl": 0.0 if i == 0 else scale**2 * i,
        }
        for i in range(LAYERS)
    ]
    tensors = [("model.embed_tokens", None, "module", 0.0), ("model.norm", None, "module", 0.8)]
    for i in range(LAYERS):
        tensors += [(f"model.layers.{i}.mlp", i, "between", 0.0), (f"model.layers.{i}.mlp", i, "module", 0.6 + i / 50)]
    modules = [
        {
            "name": name,
            "layer": layer,
            "kind": kind,
            "apart": scale * score,
            "engine_error": scale,
            "trainer_error": scale,
            "score": score,
        }
        for name, layer, kind, score in tensors
    ]
    return {
        "why": "",
        "n_tokens": 564,
        "n_sequences": 14,
        "layers": layers,
        "growth_per_layer": metric(1.03, 0.01, "interval over few sequences"),
        "first_beyond": None,
        "worst_layer": 7,
        "modules": modules,
        "end_score": 0.9,
        "located": located("no single layer", "", None, 0.9, kind=""),
    }


def located(verdict: str, name: str, layer: int | None, score: float, kind: str = "module") -> dict[str, Any]:
    return {"verdict": verdict, "name": name, "kind": kind, "layer": layer, "score": score}


def concluded(document: dict[str, Any]) -> dict[str, Any]:
    """With the conclusions that its layers, and what FP32 leaves of its gap, come to."""
    pair = (document["rollout_dtype"], document["trainer_dtype"])
    left = Left(*(document["left_in_fp32"][key]["value"] for key in ("share", "rms")))
    found = conclude(document["layers"]["dtypes"], pair, left, routers=document["experts"] is not None)
    return document | {"conclusions": found.as_dict()}


def _two_sided() -> list[dict[str, Any]]:
    cells = {"neither": effect(1.0) | unchanged()}
    cells |= {side: effect(ratio) | judged(0.02) for side, ratio in (("rollout", 1.5), ("trainer", 1.4), ("both", 0.1))}
    known = {"name": "FP16", "cells": cells, "best": "both", "hurts": ["rollout", "trainer"], "why": ""}
    return [known, {"name": "FP8 keys and values", "cells": {}, "best": None, "why": "no kv-fp8 here"}]


def _fixes() -> dict[str, Any]:
    rows = [
        {
            "classes": classes,
            "status": "measured",
            "why": "",
            **effect(ratio),
            "trainer_error_ratio": metric(ratio / 2),
            "added_time": time,
        }
        for classes, ratio, time in ((["head", "mlp"], 0.8, 0.7), (["head"], 0.9, 0.04), (["norms"], 1.04, -0.09))
    ]
    rows.append({"classes": ["rope"], "status": "unavailable", "why": "the model has no rope"})
    return {
        "rows": rows,
        "target": 0.85,
        "whole_trainer_in_fp32": metric(0.78),
        "cheapest": {"classes": ["head", "mlp"], "left": 0.8, "cost": 0.7},
        "why": "",
    }


def cause(rank: int, kind: str, text: str, share: float | None) -> dict[str, Any]:
    ends = metric(share)
    row = {"share": share, "ci_low": ends["ci_low"], "ci_high": ends["ci_high"], "why": ""}
    return {"rank": rank, "kind": kind, "text": text, "action": f"Do something about {text}."} | row


def routers() -> dict[str, Any]:
    return {
        "why": "",
        "layers": [{"layer": i, "agreement": 0.99 - 0.01 * i} for i in range(4)],
        "flipped_tokens": 0.05,
        "share_of_squares": metric(0.6),
        "own_routes": {"rms": metric(0.08), "k3": metric(4e-3)},
        "engine_routes": effect(0.64),
    }


def attribution(**changes: Any) -> dict[str, Any]:
    """Of a dense model that nothing stands out in; `changes` replace what is at the top."""
    knobs = [
        knob("rollout", "batch-1", 1.02, **judged(1.0)),
        knob("rollout", "prefix-cache", 1.0, **unchanged()),
        knob("rollout", "kv-fp8", 5.0, rms_ratio={"value": 5.0, "ci_low": 2.0, "ci_high": 150.0}),
        knob("rollout", "fp32-head", 0.8, note="the backend changed with it: A → B"),
        knob("trainer", "float16", 0.7, time_ratio=None, peak_gib=None, memory_ratio=None),
        knob("rollout", "tensor-parallel"),
        knob("trainer", "compiled", status="not asked", why="slow"),
        knob("trainer", "packed", status="failed", why="EngineError: it died"),
    ]
    causes = [
        cause(1, "rung", "decode → prefill", 0.7),
        cause(2, "change", "FP16 on both sides", 0.99),
        cause(3, "change", "trainer: FP16", 0.51),
    ]
    document = {
        "schema_version": 1,
        "tool_version": "0.1.0",
        "model": "smollm2-135m",
        "device": "cpu",
        "rollout_pass": "vllm-bfloat16-decode",
        "trainer_pass": "hf-bfloat16-cast",
        "rollout_dtype": "bfloat16",
        "trainer_dtype": "bfloat16",
        "trainer_mode": "cast",
        "n_tokens": 1949,
        "n_sequences": 64,
        "n_nonfinite": 0,
        "gap": {"rms": metric(0.065), "k3": metric(0.002)},
        "ladder": _ladder(),
        "knobs": knobs,
        "two_sided": _two_sided(),
        "layers": {
            "dtypes": {
                "float16": _inside(5e-4),
                "bfloat16": _inside(4e-3),
                "float32": {"why": "it ran out of memory", "layers": [], "modules": [], "located": None},
            },
            "rollout_eager": False,
            "eager_vs_compiled_shift": metric(0.0123),
            "eager_note": "Layers were looked into in eager mode.",
            "why": "",
        },
        "left_in_fp32": {"rms": metric(1e-5), "share": metric(2e-8)},
        "fixes": _fixes(),
        "experts": None,
        "nulls": {"rollout": bare(0.0, "there is no gap"), "trainer": metric(1e-4)},
        "failed": {"trainer-packed": "EngineError: it died"},
        "causes": causes,
    }
    return concluded(document | changes)


def faulty(score: float = 41.3) -> dict[str, Any]:
    """A stale tensor in layer 11."""
    document = attribution()
    found = document["layers"]["dtypes"]["bfloat16"]
    found["layers"][11]["score"] = score / 2
    found["modules"][2 + 2 * 11 + 1] |= {"score": score}
    found |= {"first_beyond": 11, "worst_layer": 11}
    found["located"] = located("layer", "model.layers.11.mlp", 11, score)
    fault = cause(1, "fault", "in bfloat16, model.layers.11.mlp differs", None)
    return concluded(document) | {"causes": [fault, *(row | {"rank": row["rank"] + 1} for row in document["causes"])]}


def empty() -> dict[str, Any]:
    """Nothing could be read again."""
    why = "not measured: resume it"
    return attribution(
        gap={"rms": bare(None, "no token is finite"), "k3": bare(None, "no token is finite")},
        ladder={"rungs": [], "anchor": [], "squares_over_gap": None, "why": why},
        knobs=[],
        two_sided=[],
        layers={
            "dtypes": {},
            "rollout_eager": True,
            "eager_vs_compiled_shift": None,
            "eager_note": "",
            "why": "left out: --no-layers",
        },
        fixes={"rows": [], "target": None, "cheapest": None, "why": why},
        experts={"layers": [], "why": why},
        causes=[],
    )


def nulls() -> dict[str, Any]:
    """All that may be null is, and no interval is known."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: stripped(inner) for key, inner in value.items()}
            return kept | {"ci_low": None, "ci_high": None} if "ci_low" in value else kept
        return [stripped(inner) for inner in value] if isinstance(value, list) else value

    document: dict[str, Any] = stripped(attribution(experts=routers()))
    for layer in document["layers"]["dtypes"]["bfloat16"]["layers"]:
        layer |= {"lens_kl": None}
    for row in document["fixes"]["rows"][:3]:
        row |= {"trainer_error_ratio": None}
    document["knobs"][0] |= {"rms_ratio": bare(None, "there is no gap"), **judged(None)}
    document["fixes"] |= {"whole_trainer_in_fp32": None, "cheapest": None}
    document["experts"]["engine_routes"] |= {"rms": bare(None, "no token is finite"), "rms_ratio": bare(None, "")}
    return document


def hostile() -> dict[str, Any]:
    """Every string that is not one of a few known words is hostile."""
    kept = {"rollout", "trainer", "both", "measured", "unavailable", "not asked", "failed", "rung", "change", "fault"}
    kept |= {"module", "between", "layer", "cast", "quiet", "cause"}

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return f"{value}\n{HOSTILE}" if isinstance(value, str) and value and value not in kept else value

    document: dict[str, Any] = poisoned(faulty() | {"experts": routers()})
    for part in ("layers", "conclusions"):
        rows = document[part]["dtypes"]
        document[part]["dtypes"] = {f"{name}{HOSTILE[:60]}": row for name, row in rows.items()}
    return document
