"""Audits in miniature: checks of any verdict, pairs of them, and each measurement on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch_probe.config import CompareConfig
from mismatch_probe.metrics.corrections import CORRECTIONS, Correction
from mismatch_probe.metrics.floats import ScaleRange, ScalerTrace
from mismatch_probe.probes.audit.advice import Evidence, recommend
from mismatch_probe.probes.audit.document import answers, best_pair, overall
from mismatch_probe.probes.audit.judge import made, verdict_of
from mismatch_probe.results.audit import (
    AskedFor,
    Audit,
    AuditedPair,
    AuditProvenance,
    Baseline,
    Bounds,
    Change,
    Check,
    CheckChange,
    GoneCheck,
    Level,
    ProfileName,
    Recommendation,
    Settle,
    ValueChange,
)
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.manifest import Environment, Machine
from mismatch_probe.results.ranges import (
    Activations,
    Attempt,
    ContextPeaks,
    Fp16Pass,
    Gradients,
    GradientTensor,
    KindPeak,
    Lag,
    LagCase,
    LayerMotion,
    LayerPeaks,
    Motion,
    Peak,
    Range,
    WeightMotion,
    WeightRounding,
    Weights,
    WeightTotals,
)
from mismatch_probe.types import MetricValue

LEVELS: dict[str, tuple[Level, Level]] = {
    "ok": ("ok", "ok"),
    "warn": ("warn", "warn"),
    "fail": ("fail", "fail"),
    "inconclusive": ("ok", "fail"),
    "open": ("ok", "warn"),
}
"""What the data leave open of a check of each kind: an `open` one may be ok or warn."""


def value(middle: float | None, relative: float = 0.1) -> MetricValue:
    """A value with an interval; a reason for None."""
    if middle is None:
        return MetricValue(None, why="too little data")
    return MetricValue(middle, middle * (1 - relative), middle * (1 + relative))


def check(name: str, kind: str, middle: float | None = 0.5, where: str = "", finding: Finding | None = None) -> Check:
    """A check of one kind of `LEVELS`."""
    best, worst = LEVELS[kind]
    found = value(middle)
    told = finding or evidence(name, found, where)
    bounds = Bounds(warn_above=1.0, fail_above=2.0, source=f"source of {name}")
    settle = Settle(more_prompts=40) if best != worst else None
    return made(name, best, worst, found, bounds, told, settle=settle)


def evidence(name: str, found: MetricValue, where: str) -> Finding:
    """What a check of this name could have found."""
    codes: dict[str, tuple[str, dict[str, Any]]] = {
        "nonfinite_logprobs": ("audit-logprobs-finite", {"n": 0, "n_tokens": 1_877, "values": (), "upper": 0.056}),
        "ess_seq_planned": ("audit-planned-ess-missing", {"length": 1024, "why": found.why}),
        "one_sided": ("audit-mean-ratio", {"value": found, "negligible": False}),
        "fp32_floor": ("audit-fp32-floor", {"value": found}),
        "fp16_headroom": ("audit-activation-peak", PEAK),
    }
    code, values = codes.get(name, ("audit-metric-value", {"metric": "kl_k3", "value": found}))
    return Finding(code=code, severity="info", where=where, values=values)


PEAK = {
    "peak": 25_600.0,
    "tensor": "model.layers.4",
    "position": 0,
    "longest": 48,
    "n_nonfinite": 0,
    "nonfinite_at": None,
}
"""Values of a finding on activations."""


def audited(rollout: str, trainer: str, checks: Sequence[Check], mode: str = "cast", **changes: Any) -> AuditedPair:
    """A pair with its checks."""
    given = {
        "rollout_dtype": rollout,
        "trainer_dtype": trainer,
        "trainer_mode": mode,
        "n_tokens": 1_877,
        "n_prompts": 64,
        "verdict": verdict_of(checks),
        "mean_abs_logprob_diff": value(5.36e-3),
        "checks": tuple(checks),
    }
    return AuditedPair.model_validate(given | changes)


PAIRS = (
    audited(
        "float16",
        "float16",
        [
            check("nonfinite_logprobs", "ok", 0.0),
            check("kl_k3", "ok", 3.15e-5),
            check("ess_seq_planned", "open", None),
            check("fp16_headroom", "warn", 2.29, "model.layers.4"),
        ],
    ),
    audited("bfloat16", "bfloat16", [check("kl_k3", "fail", 0.2), check("one_sided", "ok", 1.0)], "autocast"),
    audited("float16", "bfloat16", [check("kl_k3", "inconclusive", 0.01)]),
)


def compared(rollout: str, trainer: str, mode: str = "cast", **changes: Any) -> Pair:
    """A pair of the comparison, with as much as a recommendation reads."""
    given = {
        "rollout_pass": f"vllm-{rollout}-decode",
        "trainer_pass": f"hf-{trainer}-{mode}",
        "rollout_dtype": rollout,
        "trainer_dtype": trainer,
        "trainer_mode": mode,
        "on_policy": True,
        "n_tokens": 1_877,
        "n_sequences": 64,
        "n_prompts": 64,
        "n_prompts_usable": 64,
        "n_nonfinite": 0,
        "n_excluded": 0,
        "excluded": (),
        "mean_abs_logprob_diff_all_finite": None,
        "n_nonfinite_exact": 0,
        "metrics": {"kl_k3": value(3.15e-5), "kl_exact": value(None), "mean_abs_logprob_diff": value(5.36e-3)},
        "budget": None,
        "estimators": None,
        "ratio_tests": (),
        "prompts_needed": {},
        "groups": (),
    }
    return Pair.model_validate(given | changes)


def peak(name: str, kind: str, layer: int | None, largest: float, **changes: Any) -> Peak:
    given = {
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
    }
    return Peak.model_validate(given | changes)


def activations(**changes: Any) -> Activations:
    """Of five layers whose stream grows by 4 each; the largest product q·k has no FP16 number."""
    tensors = [peak(f"model.layers.{i}", "residual", i, 100.0 * 4**i) for i in range(5)]
    tensors += [peak(f"model.layers.{i}.mlp", "mlp product", i, 50.0 + i) for i in range(3)]
    tensors += [peak("scores", "attention product", 2, 7e4, n_overflow=3)]
    kinds = {row.kind: row for row in tensors}
    keys = ("first_token_peak", "rest_peak", "rest_median", "rest_p999")
    given = {
        "n_sequences": 64,
        "n_prompts": 64,
        "n_tokens": 2_607,
        "longest": 48,
        "fused_attention": True,
        "overflow_rate": MetricValue(0.0, 0.0, 0.056),
        "n_overflow": 0,
        "n_overflow_prompts": 0,
        "largest": tensors[4],
        "source": "model.layers.4",
        "first_overflow": None,
        "first_nonfinite": None,
        "kinds": {
            kind: KindPeak(**dict(row), overflows_in=("float16",) if row.peak > 65504 else ())
            for kind, row in kinds.items()
        },
        "residual_by_layer": tuple(
            LayerPeaks(layer=i, **{key: getattr(row, key) for key in keys}) for i, row in enumerate(tensors[:5])
        ),
        "by_context": tuple(
            ContextPeaks(first=first, last=last, peak=25600.0 / (first + 1), residual=20000.0 / (first + 1))
            for first, last in ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63))
        ),
        "tensors": tuple(tensors),
    }
    return Activations.model_validate(given | changes)


def overflowing(tensor: str = "model.layers.11.mlp.down_proj", layer: int = 11, **changes: Any) -> Activations:
    """Activations that FP16 has no number for, from one tensor on."""
    top = peak(tensor, "other", layer, 1.2e5, n_overflow=64)
    given = {"largest": top, "source": tensor, "first_overflow": tensor, "tensors": (top,), "n_overflow": 64}
    return activations(**given | {"n_overflow_prompts": 64, "overflow_rate": value(0.02)} | changes)


def rounding(name: str, dtype: str, error: float) -> WeightRounding:
    return WeightRounding(
        name=name,
        dtype=dtype,
        n=1_000_000,
        ndim=2,
        error=error,
        largest=2.5,
        n_nonfinite=0,
        n_overflow=0,
        n_flushed=3,
        n_subnormal=6,
    )


def weights() -> Weights:
    rows = [
        rounding(f"model.layers.{i}.weight", dtype, error * (i + 1))
        for i in range(3)
        for dtype, error in (("float16", 1e-4), ("bfloat16", 1e-3))
    ]
    fp16, bf16 = (
        WeightTotals(worst=row, n_nonfinite=0, n_overflow=0, n_flushed=9, n_subnormal=18, n=3_000_000)
        for row in rows[-2:]
    )
    return Weights(float16=fp16, bfloat16=bf16, tensors=tuple(rows))


def gradients(**changes: Any) -> Gradients:
    given = {
        "step_tokens": 131_072,
        "n_sequences": 16,
        "n_prompts": 16,
        "n_tokens": 449,
        "largest": 9.29e-4,
        "flushed_unscaled": 0.0653,
        "scales": ScaleRange(13, 26, "lm_head (activation)", "model.embed_tokens.weight"),
        "flushed_allowed": 1e-3,
        "start_exponent": 16,
        "overflow_at_start": None,
        "scaler": ScalerTrace(0, 16, (18, 19), 7, 6_000),
        "mass_by_exponent": {
            "weight": ((-60, 1e-12), (-30, 0.5), (-24, 2.0), (-20, 1.5)),
            "activation": ((-28, 1.0), (-18, 3.0)),
        },
        "tensors": tuple(
            GradientTensor(
                name=f"tensor {i}",
                largest=10.0**-i,
                n_nonfinite=0,
                flushed_unscaled=0.05 * i,
                scale_low=None if i == 0 else i,
                scale_high=None if i == 0 else 40 - i,
            )
            for i in range(3)
        ),
    }
    return Gradients.model_validate(given | changes)


def lag(**changes: Any) -> Lag:
    cases = [
        LagCase(
            name=f"{dtype}-{rate}",
            dtype=dtype,
            rate=rate,
            changed=0.0055,
            mean_abs_logprob_diff=value(size * (1 if rate is None else 1e6 * rate)),
            kl_k3=value(size**2),
        )
        for dtype, size in (("float16", 2e-3), ("bfloat16", 1.6e-2))
        for rate in (None, 1e-6, 1e-5)
    ]
    rows = [
        WeightMotion(
            dtype=dtype,
            rate=rate,
            first_ulp=5 * rate * size,
            first_reached=0.012,
            steady_ulp=rate * size,
            steady_ulp_median=rate * size / 2,
            straight_steps=5453.2,
            walk_steps=26 if rate > 5e-6 else None,
            walk_steps_generic=13,
            walk_reached=0.25,
            walk_reached_generic=0.5,
            by_layer=tuple(LayerMotion(layer=i, steady_ulp=rate * size * (i + 1)) for i in range(4)),
        )
        for dtype, size in (("bfloat16", 1e3), ("float16", 8e3))
        for rate in (1e-6, 1e-5)
    ]
    motion = Motion(steps=500, betas=(0.9, 0.95), n_weights=139_264, n_without_gradient=12, rows=tuple(rows))
    return Lag.model_validate({"cases": tuple(cases), "n_sequences": 32, "batch": 8, "motion": motion} | changes)


def proof(**changes: Any) -> Fp16Pass:
    given = {
        "mode": "cast",
        "n_sequences": 4,
        "initial_exponent": 16,
        "exponent": 15,
        "finite": True,
        "first_nonfinite_forward": None,
        "first_nonfinite_backward": "model.norm.weight",
        "attempts": (Attempt(exponent=16, forward=None, backward="model.norm.weight"),),
    }
    return Fp16Pass.model_validate(given | changes)


def measured(**changes: Any) -> Range:
    """Every measurement on the model."""
    given = {"weights": weights(), "forward": activations(), "backward": gradients(), "lag": lag(), "proof": proof()}
    return Range(**given | changes)


def baseline() -> Baseline:
    """Of an audit that is worse in one check of three."""
    pair = {"rollout_dtype": "float16", "trainer_dtype": "float16", "trainer_mode": "cast"}
    row = CheckChange(
        **pair,
        name="kl_k3",
        before=1e-4,
        after=2e-4,
        verdict_before="ok",
        verdict_after="warn",
        change=ValueChange(kind="ratio", value=2.0, ci_low=1.8, ci_high=2.2),
        finding=Finding(code="audit-verdict-worse", severity="fail", values={"before": "ok", "after": "warn"}),
    )
    moved = ValueChange(kind="difference", value=0.25, ci_low=None, ci_high=None)
    checks = (
        row.model_copy(
            update={"name": "kl_k1", "after": None, "verdict_after": "inconclusive", "change": None, "finding": None}
        ),
        row.model_copy(update={"name": "chi2_token", "change": moved, "finding": None}),
        row,
    )
    return Baseline(
        source="runs/before/audit/audit.json",
        model="smollm2-135m",
        changed=(
            Change(what="environment.versions.torch", before="2.12.0", after="2.13.0"),
            Change(what="options.learning_rates", before=None, after=[1e-6, 1e-5]),
        ),
        checks=checks,
        regressions=checks[2:],
        gone=(GoneCheck(**pair, name="fp32_floor"),),
    )


def audit(
    pairs: Sequence[AuditedPair] = PAIRS,
    found: Range | None = None,
    wanted: Sequence[tuple[str, str]] = (),
    ess: MetricValue | None = None,
    **changes: Any,
) -> Audit:
    """An audit whose verdict, answers and recommendation follow from its pairs, as the real one's do."""
    found = measured() if found is None else found
    asked = [pair for pair in pairs if pair.dtypes in wanted] if wanted else list(pairs)
    best = best_pair([pair for pair in asked if pair.n_tokens])
    decided_by = tuple(pair.name for pair in asked) if wanted else () if best is None else (best.name,)
    recommendation = None
    if best is not None:
        bounded = [name for name, one in CORRECTIONS.items() if one.bounded]
        touched: Mapping[str, MetricValue] = dict.fromkeys(bounded, value(0.002))
        evidence = Evidence(compared(*best.key), touched, ess or value(0.93, 0.02), 1024, "smollm2-135m", 1.0)
        recommendation = recommend(best, found, evidence)
    given: dict[str, Any] = {
        **Audit.stamp(),
        "tool_version": "0.1.0",
        "model": "smollm2-135m",
        "n_prompts": 64,
        "max_tokens": 32,
        "verdict": overall(pairs, decided_by, wanted),
        "decided_by": decided_by,
        "answers": answers(pairs, decided_by, (), wanted),
        "findings": (),
        "profile": ProfileName(name="default", description="Limits that frameworks publish."),
        "options": AskedFor(
            profile="default",
            planned_tokens=1024,
            step_tokens=131_072,
            learning_rates=(1e-6, 1e-5),
            pairs=tuple("/".join(pair) for pair in wanted),
            strict=False,
        ),
        "pairs": tuple(pairs),
        "recommendation": recommendation,
        "range": found,
        "missing": (),
        "provenance": AuditProvenance(
            created="2026-11-26T10:00:00+0000",
            tool_version="0.1.0",
            environment=Environment(versions={"torch": "2.13.0"}, machine=Machine(cpu="x", cores=2), variables={}),
            device="cpu",
            config=CompareConfig(model="smollm2-135m"),
            prompts_sha256="0" * 64,
            model_files={},
            measured_with={"forward": {"torch": "2.13.0"}},
        ),
        "baseline": None,
    }
    return Audit.model_validate(given | changes)


def recommendation(
    dtype: str, correction: Correction | None, loss_scale: float | None = None, mode: str = "autocast"
) -> Recommendation:
    """Of one dtype on both sides, as far as snippets read it."""
    return Recommendation(
        rollout_dtype=dtype,
        trainer_dtype=dtype,
        trainer_mode=mode,
        verdict="ok",
        loss_scale=loss_scale,
        correction=correction,
        alarm_kl_k3=None,
        findings=(),
        corrections=(),
        snippets=(),
    )


def bare() -> Audit:
    """Of a run in which nothing was compared and nothing measured."""
    missing = Finding(code="audit-parts-missing", severity="note", values={"parts": ("forward", "backward")})
    return audit((), Range(), missing=(missing,))
