"""Checks of FP16: whether the model's own range allows it, where a side of the pair runs in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mismatch_probe.metrics.floats import FIRST_SCALE, FP16, NO_SCALE
from mismatch_probe.probes.audit.checks import UNSUPPORTED, Subject, check, finding, upper
from mismatch_probe.probes.audit.judge import judged, judged_event, judged_extreme, missing, unseen_rate
from mismatch_probe.results.audit import Bounds, Check, Settle
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.ranges import Activations, Fp16Pass, Gradients, PartName, Weights
from mismatch_probe.types import MetricValue


@check(UNSUPPORTED)
def _unsupported(subject: Subject, bounds: Bounds) -> None:
    """Made by `Checks.of_unsupported` alone."""


def range_check(
    name: str, part: PartName, *, of_trainer: bool = False, extreme: bool = False, rare: bool = False
) -> Callable[[Callable[[Bounds, Any], Check]], Callable[[Bounds, Any], Check]]:
    """Registers a check of what was measured on the model itself.

    Args:
        name: Of the check.
        part: The measurement that it looks at, and is given.
        of_trainer: Whether it asks nothing of an engine that only samples.
        extreme, rare: See `OwnCheck`.
    """

    def register(run: Callable[[Bounds, Any], Check]) -> Callable[[Bounds, Any], Check]:
        @check(name, extreme=extreme, rare=rare)
        def of_part(subject: Subject, bounds: Bounds) -> Check | None:
            if "float16" not in (subject.rollout_dtype, subject.trainer_dtype):
                return None
            if of_trainer and subject.trainer_dtype != "float16":
                return None
            found = getattr(subject.measured, part)
            if found is None:
                told = finding("audit-parts-stale" if part in subject.stale else "audit-parts-missing", parts=(part,))
                return missing(name, bounds, "not measured", told, Settle(parts=(part,)))
            if isinstance(found, Fp16Pass) and found.mode != subject.trainer_mode:
                mode = subject.trainer_mode
                told = finding("audit-pass-of-other-mode", mode=found.mode, wanted=mode)
                settle = Settle(trainer_modes=(mode,))
                return missing(name, bounds, f"the pass was made in mode {found.mode}", told, settle)
            return run(bounds, found)

        return run

    return register


@range_check("fp16_headroom", "forward", extreme=True)
def _fp16_headroom(bounds: Bounds, forward: Activations) -> Check:
    top = forward.largest
    where = forward.first_overflow or forward.source
    nonfinite = sum(row.n_nonfinite for row in forward.tensors)
    over = nonfinite or forward.first_overflow is not None
    told = finding(
        "audit-activation-overflow" if over else "audit-activation-peak",
        where=where,
        peak=top.peak,
        tensor=top.name,
        position=top.position,
        longest=forward.longest,
        n_nonfinite=nonfinite,
        nonfinite_at=forward.first_nonfinite,
    )
    value = MetricValue(0.0 if nonfinite else headroom(top.peak))
    return judged_extreme("fp16_headroom", value, bounds, told, exact=True, n_prompts=forward.n_prompts)


@range_check("fp16_overflow_rate", "forward", rare=True)
def _fp16_overflow_rate(bounds: Bounds, forward: Activations) -> Check:
    n, n_prompts = forward.n_overflow, forward.n_prompts
    told = finding(
        "audit-overflow-tokens",
        where=forward.first_overflow or "",
        n=n,
        n_tokens=forward.n_tokens,
        n_prompts_hit=forward.n_overflow_prompts,
        n_prompts=n_prompts,
        upper=upper(n, n_prompts),
    )
    return judged_event("fp16_overflow_rate", n, forward.overflow_rate, bounds, told, n_prompts=n_prompts)


@range_check("fp16_attention_headroom", "forward", of_trainer=True, extreme=True)
def _fp16_attention_headroom(bounds: Bounds, forward: Activations) -> Check:
    name, top = "fp16_attention_headroom", forward.kinds.get("attention product")
    if top is None:
        return missing(name, bounds, "no product q·k was seen", finding("audit-no-attention-product"))
    told = finding("audit-attention-peak", where=top.name, peak=top.peak, fused=forward.fused_attention)
    room = MetricValue(headroom(top.peak))
    return judged_extreme(name, room, bounds, told, exact=True, n_prompts=forward.n_prompts)


@range_check("fp16_weights", "weights")
def _fp16_weights(bounds: Bounds, weights: Weights) -> Check:
    found = weights.float16
    told = finding(
        "audit-weights-rounded",
        where=found.worst.name,
        error=found.worst.error,
        n=found.n,
        n_overflow=found.n_overflow,
        n_flushed=found.n_flushed,
        n_subnormal=found.n_subnormal,
        n_nonfinite=found.n_nonfinite,
    )
    error = MetricValue(1.0 if found.n_nonfinite + found.n_overflow else found.worst.error)
    return judged("fp16_weights", error, bounds, told, exact=True)


@range_check("fp16_loss_scale", "backward", of_trainer=True, extreme=True)
def _fp16_loss_scale(bounds: Bounds, backward: Gradients) -> Check:
    name, scales, told = "fp16_loss_scale", backward.scales, backward.loss_scales()
    if scales is None:
        return missing(name, bounds, "no tensor got a gradient", told)
    room = MetricValue(float(scales.high - scales.low))
    return judged_extreme(name, room, bounds, told, exact=True, n_prompts=backward.n_prompts)


@range_check("fp16_loss_scale_start", "backward", of_trainer=True, extreme=True)
def _fp16_loss_scale_start(bounds: Bounds, backward: Gradients) -> Check:
    name, scales, trace = "fp16_loss_scale_start", backward.scales, backward.scaler
    if scales is None:
        return missing(name, bounds, "no tensor got a gradient", backward.loss_scales())
    never = trace is None or scales.high == NO_SCALE
    told = finding(
        "audit-scaler-never-steps" if never else "audit-scaler-start",
        where=backward.overflow_at_start or "",
        exponent=FIRST_SCALE,
        skipped=None if trace is None or never else trace.skipped_at_start,
    )
    room = MetricValue(float(scales.high - FIRST_SCALE))
    return judged_extreme(name, room, bounds, told, exact=True, n_prompts=backward.n_prompts)


@range_check("fp16_pass", "proof", of_trainer=True)
def _fp16_pass(bounds: Bounds, proof: Fp16Pass) -> Check:
    told = pass_finding(proof)
    broken = unseen_rate(proof.n_sequences) if proof.finite else MetricValue(1.0)
    return judged("fp16_pass", broken, bounds, told, exact=True)


def pass_finding(proof: Fp16Pass) -> Finding:
    """What became of the pass in FP16."""
    n, mode = proof.n_sequences, proof.mode
    if proof.finite:
        return finding("audit-pass-finite", n_sequences=n, mode=mode, exponent=proof.exponent)
    way = "forward" if proof.first_nonfinite_forward else "backward"
    first = proof.first_nonfinite_forward or proof.first_nonfinite_backward
    return finding("audit-pass-not-finite", where=first or "", n_sequences=n, mode=mode, way=way)


def headroom(peak: float) -> float | None:
    """FP16's largest number over a peak; None for a peak of 0."""
    return FP16.largest / peak if peak > 0 else None
