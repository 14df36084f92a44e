"""A small valid attribution: three rungs of which one undoes, settings of every status, two layers, fixes, routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mismatch_probe.metrics.inside import NOTHING, THRESHOLD, Inside, LayerRow, TensorRow
from mismatch_probe.metrics.ladder import NO_GAP, UNCHANGED, Change, Fix, Gap
from mismatch_probe.probes.attribute.attribution import findings_of
from mismatch_probe.results.attribution import (
    Attribution,
    BothSides,
    Experts,
    Fixes,
    FixResult,
    Ladder,
    LadderPass,
    LadderRung,
    Layers,
    LeftInFp32,
    RouterLayer,
    SelfNoise,
    SettingResult,
    Side,
)
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

RMS = 0.065


def metric(value: float | None, half: float = 0.1, why: str = "") -> MetricValue:
    """With an interval of `half` of the value on both sides."""
    if value is None:
        return MetricValue(None, why=why)
    return MetricValue(value, value - half * abs(value), value + half * abs(value), why)


def effect(ratio: float, p_holm: float | None = 0.02, shift: float = 0.03) -> Change:
    """What multiplies the RMS of the gap."""
    differs = None if p_holm is None else p_holm < 0.05
    own, ratios = (metric(RMS * ratio), metric(0.002 * ratio**2)), (metric(ratio, 0.05), metric(ratio**2))
    return Change(*own, *ratios, metric(shift), p_value=0.01, p_holm=p_holm, differs=differs)


def unchanged() -> Change:
    """What moves no token."""
    one, none = MetricValue(1.0, why=UNCHANGED), MetricValue(0.0, why=UNCHANGED)
    return Change(metric(RMS), metric(0.002), one, one, none)


def setting(side: Side, key: str, found: Change | None = None, **changes: Any) -> SettingResult:
    """Measured where it has an effect."""
    row = SettingResult(
        name=f"{side}-{key}",
        side=side,
        key=key,
        change=f"{key} changed",
        options=(f"--engine-arg={key}",) if side == "rollout" else (),
        environment={},
        status="unsupported" if found is None else "measured",
        why=f"no {key} here" if found is None else "",
        effect=found,
    )
    if found is not None:
        cost = {"n_tokens": 1949, "n_nonfinite": 0, "time_ratio": 1.5, "peak_gib": 2.25, "memory_ratio": 1.1}
        row = row.model_copy(update=cost)
    return row.model_copy(update=changes)


def ladder(prefill: float = 0.7, engine: float = 0.6, layout: float = -0.3) -> Ladder:
    """Of contributions."""
    return Ladder(
        rungs=(
            _rung("prefill", "sampled", "prefill", prefill),
            _rung("engine", "prefill", "rollout-batching", engine),
            _rung("layout", "rollout-batching", "trained", layout),
        ),
        passes=(
            LadderPass(key="sampled", error_rms=metric(0.050)),
            LadderPass(key="prefill", error_rms=metric(0.051)),
            LadderPass(key="rollout-batching", error_rms=metric(0.052)),
            LadderPass(key="trained", error_rms=metric(0.053)),
        ),
        n_nonfinite=0,
        squares_over_gap=2.7,
        why="",
    )


def _rung(key: Any, before: Any, after: Any, contribution: float) -> LadderRung:
    rms, mean, part = metric(0.06), metric(-1e-3), metric(contribution)
    return LadderRung(key=key, before=before, after=after, rms=rms, mean=mean, contribution=part)


NO_LADDER = Ladder(rungs=(), passes=(), n_nonfinite=0, squares_over_gap=None, why="not measured yet")


def inside(scale: float, layers: int = 2) -> Inside:
    """Nothing stands out."""
    tensors = [TensorRow("model.norm", None, "module", scale, scale, scale, 0.8)]
    for i in range(layers):
        name = f"model.layers.{i}.mlp"
        tensors.append(TensorRow(name, i, "between", 0.0, scale, scale, 0.0))
        tensors.append(TensorRow(name, i, "module", 0.6 * scale, scale, scale, 0.6))
    rows = [LayerRow(i, scale * (1 + i), scale, 1.4 * scale, 0.7, scale**2 * i) for i in range(layers)]
    rows[-1] = replace(rows[-1], score=0.9)
    growth = metric(1.03, 0.01, "interval over few sequences")
    end = layers - 1
    return Inside("", 564, 14, tuple(rows), growth, None, end, 0.9, tuple(tensors), replace(NOTHING, score=0.8))


def faulty(found: Inside, score: float = 41.3, layer: int = 1) -> Inside:
    """A stale tensor in a layer."""
    name = f"model.layers.{layer}.mlp"
    rows = tuple(replace(row, score=score / 2) if row.layer == layer else row for row in found.layers)
    tensors = tuple(replace(t, score=score) if (t.layer, t.kind) == (layer, "module") else t for t in found.tensors)
    located = replace(NOTHING, verdict="layer", kind="module", name=name, layer=layer, score=score)
    return replace(found, layers=rows, tensors=tensors, located=located, first_beyond=layer, worst_layer=layer)


def layers(dtypes: Mapping[str, Inside], why: str = "") -> Layers:
    """Of dtypes."""
    shift = metric(0.0123)
    return Layers(dtypes=dict(dtypes), threshold=THRESHOLD, rollout_eager=False, eager_vs_compiled_shift=shift, why=why)


def routers() -> Experts:
    """The engine's routes close part of the gap."""
    return Experts(
        why="",
        layers=tuple(RouterLayer(layer=i, agreement=0.99 - 0.01 * i) for i in range(4)),
        flipped_tokens=0.05,
        contribution=metric(0.6),
        own_routes=Gap(metric(0.08), metric(4e-3)),
        engine_routes=effect(0.64),
    )


def _fixes() -> Fixes:
    tried = ((("head", "mlp"), 0.8, 0.7), (("head",), 0.9, 0.04), (("norms",), 1.04, -0.09))
    rows = [
        FixResult(
            classes=classes,
            status="measured",
            why="",
            effect=effect(ratio),
            trainer_error_ratio=metric(ratio / 2),
            added_time=time,
        )
        for classes, ratio, time in tried
    ]
    rows.append(FixResult(classes=("rope",), status="unsupported", why="the model has no rope"))
    cheapest = Fix(("head", "mlp"), 0.8, 0.7)
    return Fixes(rows=tuple(rows), target=0.85, whole_trainer_in_fp32=metric(0.78), cheapest=cheapest, why="")


NO_FIXES = Fixes(rows=(), target=None, whole_trainer_in_fp32=None, cheapest=None, why="no class was asked for")


def attribution(**changes: Any) -> Attribution:
    """Of a dense model that nothing stands out in, with the findings that it comes to; `changes` replace fields."""
    note = Finding(code="attention-changed-too", severity="note", values={"before": "A", "after": "B"})
    settings = (
        setting("rollout", "batch-1", effect(1.02, 1.0)),
        setting("rollout", "prefix-cache", unchanged()),
        setting("rollout", "kv-fp8", replace(effect(5.0), rms_ratio=MetricValue(5.0, 2.0, 150.0))),
        setting("rollout", "fp32-head", effect(0.8), notes=(note,)),
        setting("trainer", "float16", effect(0.7), time_ratio=None, peak_gib=None, memory_ratio=None),
        setting("rollout", "float16", effect(0.9, 0.13)),
        setting("rollout", "tensor-parallel"),
        setting("trainer", "compiled", status="skipped", why="slow"),
        setting("trainer", "layout-packed", status="failed", why="it died"),
    )
    variants = {"neither": unchanged(), "rollout": effect(1.5), "trainer": effect(1.4), "both": effect(0.1)}
    found = Attribution(
        **Attribution.stamp() | {"tool_version": "0.1.0"},
        model="smollm2-135m",
        device="cpu",
        rollout_pass="vllm-bfloat16-decode",
        trainer_pass="hf-bfloat16-cast",
        rollout_dtype="bfloat16",
        trainer_dtype="bfloat16",
        trainer_mode="cast",
        trainer_layout="padded",
        n_tokens=1949,
        n_sequences=64,
        n_nonfinite=0,
        n_impossible=0,
        gap=Gap(metric(RMS), metric(0.002)),
        self_noise=SelfNoise(rollout=MetricValue(0.0, why=NO_GAP), trainer=metric(1e-4)),
        ladder=ladder(),
        settings=settings,
        both_sides=(
            BothSides(key="float16", variants=variants, best="both", hurts=("rollout", "trainer"), why=""),
            BothSides(key="kv-fp8", variants={}, best=None, hurts=(), why="no kv-fp8 here"),
        ),
        layers=layers({"bfloat16": inside(4e-3), "float16": inside(5e-4), "float32": Inside("it ran out of memory")}),
        left_in_fp32=LeftInFp32(rms=metric(1e-5), fraction=metric(2e-8)),
        fixes=_fixes(),
        experts=None,
        failed={"trainer-layout-packed": "it died"},
        findings=(),
    ).model_copy(update=changes)
    return found.model_copy(update={"findings": findings_of(found)})
