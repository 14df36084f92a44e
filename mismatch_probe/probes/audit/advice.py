"""What to do: precision, loss scale, correction, and the mismatch to raise an alarm at, each with the number behind.

Snippets are configurations that do it, for TRL, verl and vLLM's command line. Keys are those of TRL 1.16, verl 0.9.1
and vLLM 0.32; tests look each of them up in the installed package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mismatch_probe.config import RECORDED
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.metrics.corrections import CORRECTIONS, Correction
from mismatch_probe.metrics.floats import FIRST_SCALE
from mismatch_probe.results.audit import AuditedPair, PrecisionPair, Recommendation, Snippet, TouchedTokens, Verdict
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.ranges import Gradients, Lag, Range
from mismatch_probe.types import MetricValue

_SEVERITY: dict[Verdict, Severity] = {"ok": "info", "warn": "warn", "inconclusive": "note", "fail": "fail"}
# Predicted ESS of sequence weights, by which end of its band they are good for what.
ALL_BUT_ONE, HALF, TENTH = 0.95, 0.5, 0.1
# The alarm is this many times the upper limit of what was measured: a step's own KL estimate scatters.
ALARM_FACTOR = 3.0
# Left above the first loss scale, powers of two: gradients were measured a sequence at a time, and a trainer that adds
# up 128 of them in FP16 has sums that are some 2^3.5 times larger.
_ROOM = 4
# Fractions of tokens that a correction touches.
MANY, FEW = 0.01, 0.1
_TRL_MODES = {
    "token-tis": "token_truncate",
    "token-mis": "token_mask",
    "seq-tis": "sequence_truncate",
    "seq-mis": "sequence_mask",
}
_RC = "algorithm.rollout_correction"
_MIXED = "fsdp_config.mixed_precision"
_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Evidence:
    """What a recommendation rests on.

    Attributes:
        pair: Of the comparison, the one that is recommended.
        touched: By correction, the fraction of its tokens that it touches.
        planned_ess: Predicted ESS of its sequence weights; None without a prediction.
        planned_tokens: Response length that the prediction is of.
        model: The checkpoint's name.
        temperature: That was compared.
    """

    pair: Pair
    touched: Mapping[str, MetricValue]
    planned_ess: MetricValue | None
    planned_tokens: int
    model: str
    temperature: float


def recommend(best: AuditedPair, measured: Range, evidence: Evidence) -> Recommendation:
    """Recommends a configuration for a pair. Of one that fails there is none: nothing is scaled, corrected or pasted.

    Args:
        best: Chosen by `best_pair`.
        measured: On the model itself.
        evidence: What else it rests on.
    """
    fails = best.verdict == "fail"
    scale, scaled = (None, ()) if fails else loss_scale(best, measured.backward)
    correction, corrected = correction_for(
        best.verdict, evidence.planned_ess, evidence.touched, evidence.planned_tokens
    )
    alarm, expected = _alarm(evidence.pair)
    found = Recommendation(
        **dict(best.name),
        verdict=best.verdict,
        loss_scale=None if scale is None else 2.0**scale,
        correction=correction,
        alarm_kl_k3=alarm,
        findings=(_precision(best), *scaled, corrected, *_lag(best, measured.lag), *expected),
        corrections=tuple(
            TouchedTokens(correction=c, fraction=evidence.touched[c.name])
            for c in CORRECTIONS.values()
            if c.name in evidence.touched
        ),
        snippets=(),
    )
    if fails:
        return found
    return found.model_copy(update={"snippets": snippets(found, evidence.model, evidence.temperature)})


def _precision(best: AuditedPair) -> Finding:
    values: dict[str, Value] = {"rollout": best.rollout_dtype, "trainer": best.trainer_dtype, "mode": best.trainer_mode}
    return Finding(
        code="audit-no-precision" if best.verdict == "fail" else "audit-best-precision",
        severity=_SEVERITY[best.verdict],
        values=values | {"verdict": best.verdict, "gap": best.mean_abs_logprob_diff},
    )


def loss_scale(pair: PrecisionPair, backward: Gradients | None) -> tuple[int | None, tuple[Finding, ...]]:
    """Exponent of the first loss scale, with its reason; None for a trainer that needs none, or where there is none."""
    if pair.trainer_dtype != "float16":
        return None, ()
    if backward is None:
        return None, (Finding(code="audit-parts-missing", severity="note", values={"parts": ("backward",)}),)
    told, scales = backward.loss_scales(), backward.scales
    if scales is None or told.code != "audit-loss-scales":
        return None, (told,)
    start = max(scales.low, min(FIRST_SCALE, scales.high - _ROOM))
    return start, (
        told.model_copy(update={"code": "audit-first-loss-scale", "values": {**told.values, "start": start}}),
    )


def correction_for(
    verdict: Verdict, ess: MetricValue | None, touched: Mapping[str, MetricValue], planned: int
) -> tuple[Correction | None, Finding]:
    """What to do with importance weights, with its reason.

    Args:
        verdict: Of the pair.
        ess: Predicted for its sequence weights.
        touched: By correction, the fraction of tokens.
        planned: Response length, tokens.
    """
    token, masked = CORRECTIONS["token-tis"], touched.get("token-tis", MetricValue(None))
    if verdict == "fail":
        return None, Finding(code="audit-no-correction-of-a-fault", severity="fail")

    def told(code: str, found: Correction | None) -> tuple[Correction | None, Finding]:
        values: dict[str, Value] = {"length": planned, "ess": ess}
        if found is not None:
            values |= {"correction": found.name, "low": found.low, "high": found.high}
            values |= {"touched": touched.get(found.name, MetricValue(None)), "capped": masked}
        return found, Finding(code=code, severity="info", values=values)

    if ess is None or ess.ci_low is None or ess.ci_high is None or "extrapolated" in ess.why:
        return told("audit-sequence-weights-unknown", token)
    if ess.ci_low >= ALL_BUT_ONE:
        return told("audit-no-correction-needed", None)
    if ess.ci_low >= HALF:
        return told("audit-sequence-weights-serve", CORRECTIONS["seq-tis"])
    if ess.ci_low >= TENTH:
        return told("audit-sequence-weights-noisy", CORRECTIONS["seq-mis"])
    if (masked.value or 0.0) > MANY:
        # Capping that many tokens is a bias of its own.
        out = touched["geometric"].value
        return told(
            "audit-mask-rather-than-cap", CORRECTIONS["geometric" if out is not None and out < FEW else "token-mis"]
        )
    return told("audit-sequence-weights-unusable" if ess.ci_high < HALF else "audit-sequence-weights-unreliable", token)


def _lag(pair: PrecisionPair, lag: Lag | None) -> tuple[Finding, ...]:
    dtype = pair.rollout_dtype
    if lag is None or dtype not in ("bfloat16", "float16"):
        return ()
    steady = next(case for case in lag.cases if case.dtype == dtype and case.rate is None)
    row = next((row for row in lag.motion.rows if row.dtype == dtype), None) if lag.motion else None
    values: dict[str, Value] = {"dtype": dtype, "gap": steady.mean_abs_logprob_diff}
    if row is not None and row.straight_steps is not None:
        values |= {"rate": row.rate, "steps": row.straight_steps}
    return (Finding(code="audit-engine-lag", severity="info", values=values),)


def _alarm(pair: Pair) -> tuple[float | None, tuple[Finding, ...]]:
    exact = pair.metrics["kl_exact"]
    key = "kl_k3" if exact.value is None else "kl_exact"
    kl = pair.metrics[key]
    if kl.value is None or kl.ci_high is None:
        return None, ()
    alarm = ALARM_FACTOR * kl.ci_high
    values: dict[str, Value] = {"metric": key, "value": kl, "alarm": alarm, "factor": ALARM_FACTOR}
    return alarm, (Finding(code="audit-expected-kl", severity="info", values=values),)


def snippets(choice: Recommendation, model: str, temperature: float = 1.0) -> tuple[Snippet, ...]:
    """The recommendation in each framework's own terms.

    Args:
        choice: The recommendation.
        model: The checkpoint's name.
        temperature: That was audited.
    """
    found = (_trl(choice, temperature), _verl(choice, temperature))
    return found if choice.rollout_dtype == RECORDED else (*found, _vllm(choice, model))


def _trl(choice: Recommendation, temperature: float) -> Snippet:
    """Fields of `GRPOConfig`; weights are loaded in FP32, since mixed precision trains on FP32 masters."""
    dtype, correction = choice.trainer_dtype, choice.correction
    precision = {} if dtype == RECORDED else {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    values: dict[str, Any] = {
        **precision,
        "model_init_kwargs": {"dtype": "float32"},
        "use_vllm": True,
        "vllm_mode": "server",
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "vllm_importance_sampling_correction": correction is not None and correction.name in _TRL_MODES,
    }
    served = "" if choice.rollout_dtype == RECORDED else choice.rollout_dtype
    notes = [_note("audit-trl-serves-apart", dtype=served)]
    if choice.trainer_mode == "cast" and dtype in _HALVES:
        notes.append(_note("audit-trl-trains-under-autocast"))
    if correction is not None and correction.name in _TRL_MODES:
        values["vllm_importance_sampling_mode"] = _TRL_MODES[correction.name]
        values["vllm_importance_sampling_clip_max"] = correction.high
        if correction.low:
            values["vllm_importance_sampling_clip_min"] = correction.low
    elif correction is not None:
        notes.append(_note("audit-trl-has-no-correction", correction=correction.name))
    notes += _scale_notes(choice, "audit-trl-sets-no-loss-scale")
    body = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    return Snippet(framework="trl", text=f"GRPOConfig(\n{body})", notes=tuple(notes))


def _verl(choice: Recommendation, temperature: float) -> Snippet:
    """Overrides for `python3 -m verl.trainer.main_ppo`; `+` adds a key that its YAML does not spell out."""
    rollout, trainer = choice.rollout_dtype, choice.trainer_dtype
    mixed = ""
    if trainer in DTYPE_INFOS:
        mixed = f"{{param_dtype:{DTYPE_INFOS[trainer].short},reduce_dtype:fp32,buffer_dtype:fp32}}"
    values: dict[str, Any] = {
        "actor_rollout_ref.rollout.name": "vllm",
        **({} if rollout == RECORDED else {"actor_rollout_ref.rollout.dtype": rollout}),
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.logprobs_mode": "processed_logprobs",
        "actor_rollout_ref.rollout.temperature": temperature,
        "actor_rollout_ref.rollout.top_p": 1.0,
        "actor_rollout_ref.rollout.top_k": -1,
        **({f"+actor_rollout_ref.{side}.{_MIXED}": mixed for side in ("actor", "ref")} if mixed else {}),
        **_verl_correction(choice.correction),
    }
    notes = [_note("audit-fsdp-mixed-precision"), *_scale_notes(choice, "audit-fsdp-sets-no-loss-scale")]
    lines = " \\\n".join(f"  {shlex.quote(f'{key}={_hydra(value)}')}" for key, value in values.items())
    text = f"python3 -m verl.trainer.main_ppo \\\n{lines}"
    return Snippet(framework="verl", text=text, notes=tuple(notes))


def _verl_correction(correction: Correction | None) -> Mapping[str, Any]:
    if correction is None:
        return {f"{_RC}.rollout_is": None, f"{_RC}.rollout_rs": None}
    # Written with a decimal point, and in quotes, so that Hydra does not read 0.5_2 as a number.
    bounds = f'"{correction.low or 1e-9!r}_{correction.high!r}"'
    if correction.level == "geometric":
        return {f"{_RC}.rollout_is": None, f"{_RC}.rollout_rs": "seq_mean_k1", f"{_RC}.rollout_rs_threshold": bounds}
    threshold = bounds if correction.masks else correction.high
    return {f"{_RC}.rollout_is": correction.level, f"{_RC}.rollout_is_threshold": threshold, f"{_RC}.rollout_rs": None}


def _vllm(choice: Recommendation, model: str) -> Snippet:
    flags = f"--dtype {choice.rollout_dtype} --logprobs-mode processed_logprobs --generation-config vllm"
    text = f"vllm serve {shlex.quote(model)} {flags}"
    return Snippet(framework="vllm", text=text, notes=(_note("audit-vllm-processed-logprobs"),))


def _scale_notes(choice: Recommendation, code: str) -> list[Finding]:
    """Told where the recommended first loss scale is not the usual one."""
    differs = choice.loss_scale is not None and choice.loss_scale != 2.0**FIRST_SCALE
    return [_note(code, scale=choice.loss_scale, usual=2.0**FIRST_SCALE)] if differs else []


def _hydra(value: Any) -> str:
    return "null" if value is None else str(value)


def _note(code: str, **values: Value) -> Finding:
    return Finding(code=code, severity="info", values=values)
