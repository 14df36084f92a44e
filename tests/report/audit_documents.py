"""An audit in miniature: two pairs with every status between them, and each part of the range."""

from __future__ import annotations

from typing import Any

from tests.report.conftest import HOSTILE

PARTS = ("weights", "forward", "backward", "lag", "proof")


def check(name: str, status: str, value: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    """A check; one that is not judged may pass or warn."""
    level = "pass" if status == "not judged" else status
    return {
        "name": name,
        "title": name,
        "status": status,
        "best": level,
        "worst": "warn" if status == "not judged" else level,
        "why": "",
        **metric(value),
        "exact": False,
        "limits": {"warn_above": 1.0},
        "threshold": f"warn above {name}",
        "source": f"source of {name}",
        "evidence": f"Evidence of {name}.",
        "where": None,
        "more_prompts": None,
    } | changes


def metric(value: float | None, share: float = 0.1) -> dict[str, Any]:
    if value is None:
        return {"value": None, "ci_low": None, "ci_high": None, "why": "too little data"}
    return {"value": value, "ci_low": value * (1 - share), "ci_high": value * (1 + share)}


def pair(rollout: str, trainer: str, verdict: str, checks: list[dict[str, Any]], mode: str = "cast") -> dict[str, Any]:
    return {
        "rollout_dtype": rollout,
        "trainer_dtype": trainer,
        "trainer_mode": mode,
        "n_tokens": 1_877,
        "n_prompts": 64,
        "verdict": verdict,
        "mean_abs_logprob_diff": metric(5.36e-3),
        "checks": checks,
    }


def peak(name: str, kind: str, layer: int | None, largest: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "layer": layer,
        "peak": largest,
        "first_token_peak": largest,
        "rest_peak": largest / 10,
        "rest_median": largest / 1000,
        "rest_p99": largest / 200,
        "rest_p999": largest / 100,
        "n_overflow": 0,
        "n_nonfinite": 0,
        "sequence": 49,
        "position": 0,
    } | changes


def _forward() -> dict[str, Any]:
    tensors = [peak(f"model.layers.{i}", "residual", i, 100.0 * 4**i) for i in range(5)]
    tensors += [peak(f"model.layers.{i}.mlp", "mlp product", i, 50.0 + i) for i in range(8)]
    tensors += [peak("scores", "attention product", 2, 7e4, n_overflow=3)]
    keys = ("first_token_peak", "rest_peak", "rest_median", "rest_p999")
    kinds = {row["kind"]: row for row in tensors}
    return {
        "n_sequences": 64,
        "n_prompts": 64,
        "n_tokens": 2_607,
        "longest": 48,
        "fused_attention": True,
        "overflow_tokens": {"value": 0.0, "ci_low": 0.0, "ci_high": 0.056, "n": 0, "n_prompts": 0},
        "largest": tensors[4],
        "source": "model.layers.4",
        "first_overflow": None,
        "kinds": {
            kind: row | {"overflow": {"float16": row["peak"] > 65504, "bfloat16": False, "float32": False}}
            for kind, row in kinds.items()
        },
        "residual_by_layer": [{"layer": row["layer"], **{key: row[key] for key in keys}} for row in tensors[:5]],
        "by_context": [
            {"first": first, "last": last, "peak": 25600.0 / (first + 1), "residual": 20000.0 / (first + 1)}
            for first, last in ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63))
        ],
        "tensors": tensors,
    }


def _weights() -> dict[str, Any]:
    rows = [
        {
            "name": f"model.layers.{i}.weight",
            "dtype": dtype,
            "n": 1_000_000,
            "ndim": 2,
            "n_nonfinite": 0,
            "error": error * (i + 1),
            "largest": 2.5,
            "n_overflow": 0,
            "n_flushed": i,
            "n_subnormal": 2 * i,
        }
        for i in range(12)
        for dtype, error in (("float16", 1e-4), ("bfloat16", 1e-3))
    ]
    counts = {"n": 12_000_000, "n_overflow": 0, "n_flushed": 66, "n_subnormal": 132, "n_nonfinite": 0}
    return {"float16": {"worst": rows[-2], **counts}, "bfloat16": {"worst": rows[-1], **counts}, "tensors": rows}


def _backward() -> dict[str, Any]:
    return {
        "loss": "−Σ A log π / N over response tokens",
        "step_tokens": 131_072,
        "n_sequences": 16,
        "n_prompts": 16,
        "n_tokens": 449,
        "largest": 9.29e-4,
        "flushed_unscaled": 0.0653,
        "scales": {"low": 13, "high": 26, "low_by": "lm_head (activation)", "high_by": "model.embed_tokens.weight"},
        "flushed_allowed": 1e-3,
        "start_exponent": 16,
        "overflow_at_start": None,
        "scaler": {"skipped_at_start": 0, "first": 16, "settled": [18, 19], "skipped": 7, "steps": 6_000},
        "mass_by_exponent": {
            "weight": [[-60, 1e-12], [-30, 0.5], [-24, 2.0], [-20, 1.5]],
            "activation": [[-28, 1.0], [-18, 3.0]],
        },
        "tensors": [
            {
                "name": f"tensor {i}",
                "largest": 10.0 ** -(i % 5),
                "n_nonfinite": 0,
                "flushed_unscaled": 0.05 * i,
                "scale_low": None if i == 0 else i,
                "scale_high": None if i == 0 else 40 - i,
            }
            for i in range(14)
        ],
    }


def _lag() -> dict[str, Any]:
    cases = [
        {
            "name": f"{dtype}-{rate}",
            "dtype": dtype,
            "rate": rate,
            "changed": 0.0055,
            "mean_abs_logprob_diff": metric(size * (1 if rate is None else 1e6 * rate)),
            "kl_k3": metric(size**2),
        }
        for dtype, size in (("float16", 2e-3), ("bfloat16", 1.6e-2))
        for rate in (None, 1e-6, 1e-5)
    ]
    rows = [
        {
            "dtype": dtype,
            "rate": rate,
            "first_ulp": 5 * rate * size,
            "first_reached": 0.012,
            "steady_ulp": rate * size,
            "steady_ulp_median": rate * size / 2,
            "straight_steps": 5453.2,
            "walk_steps": 26 if rate > 5e-6 else None,
            "walk_steps_generic": 13,
            "walk_reached": 0.25,
            "walk_reached_generic": 0.5,
            "by_layer": [{"layer": i, "steady_ulp": rate * size * (i + 1)} for i in range(4)],
        }
        for dtype, size in (("bfloat16", 1e3), ("float16", 8e3))
        for rate in (1e-6, 1e-5)
    ]
    motion = {"steps": 500, "betas": [0.9, 0.95], "n_weights": 139_264, "n_without_gradient": 12, "rows": rows}
    return {"cases": cases, "n_sequences": 32, "batch": 8, "motion": motion}


def _proof() -> dict[str, Any]:
    return {
        "mode": "cast",
        "n_sequences": 4,
        "initial_exponent": 16,
        "exponent": 15,
        "finite": True,
        "first_nonfinite_forward": None,
        "first_nonfinite_backward": "model.norm.weight",
        "attempts": [{"exponent": 16, "forward": None, "backward": "model.norm.weight"}],
    }


def baseline() -> dict[str, Any]:
    """Of an audit that has got worse in one check of two."""
    row = {"rollout_dtype": "float16", "trainer_dtype": "float16", "trainer_mode": "cast"}
    worse = {
        "name": "kl_k3",
        "before": 1e-4,
        "after": 2e-4,
        "status_before": "pass",
        "status_after": "warn",
        "change": {"kind": "ratio", "value": 2.0, "ci_low": 1.8, "ci_high": 2.2},
        "regressed": True,
        "why": "pass before, warn now",
    }
    lost = worse | {
        "name": "kl_k1",
        "after": None,
        "status_after": "not judged",
        "change": None,
        "regressed": False,
        "why": "it can no longer be judged",
    }
    moved = worse | {"change": {"kind": "difference", "value": 0.25, "ci_low": None, "ci_high": None}}
    checks = [row | lost, row | moved | {"name": "chi2_token", "regressed": False, "why": ""}, row | worse]
    return {
        "source": "runs/before/audit/audit.json",
        "model": "smollm2-135m",
        "changed": [
            {"what": "versions.torch", "before": "2.12.0", "after": "2.13.0"},
            {"what": "options.learning_rates", "before": None, "after": [1e-6, 1e-5]},
        ],
        "checks": checks,
        "regressions": checks[2:],
        "gone": ["fp32_floor of float16 → float16"],
    }


def precision(dtype: str, pair: str | None, verdict: str, check: str | None, **changes: Any) -> dict[str, Any]:
    row = {"dtype": dtype, "pair": pair, "verdict": verdict, "check": check, "evidence": f"Evidence of {check}."}
    return row | {"more_prompts": None, "settle": ""} | changes


def audit_document(**changes: Any) -> dict[str, Any]:
    """Warns for FP16, which decides; BF16 fails. `changes` replace what is at the top."""
    decides = [
        check("nonfinite_logprobs", "pass", 0.0),
        check("kl_k3", "pass", 3.15e-5),
        check("ess_seq_planned", "not judged", 0.93, ci_low=None, ci_high=None, why="extrapolated"),
        check("fp16_headroom", "warn", 2.29, where="model.layers.4"),
    ]
    fails = [check("kl_k3", "fail", 0.2), check("fp16_pass", "not judged", None), check("one_sided", "pass", 1.0)]
    correction = {
        "name": "seq-tis",
        "title": "sequence truncated importance sampling",
        "level": "sequence",
        "low": 0.0,
        "high": 3.0,
        "masks": False,
    }
    geometric = {"name": "geometric", "title": "geometric mean", "level": "geometric", "low": 0.999, "high": 1.001}
    return {
        "schema_version": 1,
        "model": "smollm2-135m",
        "verdict": "warn",
        "decided_by": ["float16 → float16"],
        "precisions": [
            precision("bfloat16", "bfloat16 → bfloat16 (autocast)", "fail", "kl_k3"),
            precision("float16", "float16 → float16", "warn", "fp16_headroom"),
            precision("float32", None, "not judged", None, more_prompts=40, settle="About 40 more prompts."),
        ],
        "profile": {"name": "default", "description": "Limits that frameworks publish."},
        "options": {
            "profile": "default",
            "planned_tokens": 1024,
            "step_tokens": 131_072,
            "learning_rates": [1e-6, 1e-5],
            "pairs": [],
            "strict": False,
        },
        "pairs": [pair("float16", "float16", "warn", decides), pair("bfloat16", "bfloat16", "fail", fails, "autocast")],
        "recommendation": {
            "rollout_dtype": "float16",
            "trainer_dtype": "float16",
            "trainer_mode": "cast",
            "verdict": "warn",
            "loss_scale": 2.0**14,
            "correction": correction,
            "alarm_kl_k3": 1.2e-4,
            "sentences": ["FP16 on both sides: warn.", "Start dynamic loss scaling at 2^14."],
            "corrections": [
                correction | {"touched": metric(0.002)},
                geometric | {"masks": True, "touched": metric(0.437)},
                geometric | {"name": "seq-mis", "low": 0.0, "masks": True, "touched": metric(None)},
            ],
            "snippets": [
                {"framework": "trl", "text": "GRPOConfig(\n    fp16=True,\n)", "note": "No key for vLLM's dtype."},
                {"framework": "vllm", "text": "vllm serve smollm2-135m", "note": "Log-probs of the sampling law."},
            ],
        },
        "range": {
            "weights": _weights(),
            "forward": _forward(),
            "backward": _backward(),
            "lag": _lag(),
            "proof": _proof(),
        },
        "missing": [{"what": "float32 → float32", "why": "the pass was not run"}],
        "provenance": {"created": "2026-11-26", "versions": {"torch": "2.13.0"}, "device": "cpu", "model_files": {}},
        "baseline": None,
    } | changes


def bare_document() -> dict[str, Any]:
    """Of a run in which nothing was compared and nothing measured."""
    return audit_document(
        verdict="not judged",
        decided_by=[],
        precisions=[],
        pairs=[],
        recommendation=None,
        range=dict.fromkeys(PARTS),
        missing=[],
        provenance={},
    )


def hostile_document() -> dict[str, Any]:
    """Every string that is not one of a few known words is hostile."""
    kept = {"pass", "warn", "fail", "not judged", "ratio", "difference", "residual", "float16", "bfloat16", "cast"}
    label = f"{HOSTILE} → {HOSTILE}"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return f"{value}\n{HOSTILE}" if isinstance(value, str) and value not in kept else value

    document: dict[str, Any] = poisoned(audit_document(baseline=baseline()))
    for found, trainer in zip(document["pairs"], (HOSTILE, f"{HOSTILE}2"), strict=True):
        found |= {"rollout_dtype": HOSTILE, "trainer_dtype": trainer, "trainer_mode": "cast"}
    document["range"]["forward"]["kinds"] = {HOSTILE: next(iter(document["range"]["forward"]["kinds"].values()))}
    for row in (*document["range"]["lag"]["cases"], *document["range"]["lag"]["motion"]["rows"]):
        row["dtype"] = f"{row['dtype']}{HOSTILE[:60]}"
    return document | {"decided_by": [label]}
