"""`attribution.json`: what the passes of a run say about where its gap arises.

Shape legend: `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts of a token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.attribute.rollout import ROUTES
from mismatch_probe.engines.attribute.variants import UNKNOWN
from mismatch_probe.metrics.inside import THRESHOLD, Inside, inside_of
from mismatch_probe.metrics.ladder import contribution_of
from mismatch_probe.probes.attribute.effects import fixes_of, ladder_of, setting_results
from mismatch_probe.probes.attribute.findings import findings_of
from mismatch_probe.probes.attribute.passes import FOLLOWED, Evidence, inside_name
from mismatch_probe.probes.attribute.settings import REPLAY, TRAINER
from mismatch_probe.results.attribution import (
    Attribution,
    Experts,
    Layers,
    LeftInFp32,
    RouterLayer,
    SelfNoise,
    SettingResult,
)
from mismatch_probe.types import MetricValue

NO_WIDE = "it needs layers in float32, and a trainer in float32"


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
