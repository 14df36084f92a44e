"""Configurations that do what an audit recommends, for TRL, verl and vLLM's command line.

Keys are those of TRL 1.16, verl 0.9.1 and vLLM 0.32; tests look each of them up in the installed package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from mismatch_probe.config import RECORDED
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.metrics.corrections import Correction
from mismatch_probe.metrics.floats import FIRST_SCALE
from mismatch_probe.results.audit import Recommendation, Snippet
from mismatch_probe.results.finding import Finding, Value

_TRL_MODES = {
    "token-tis": "token_truncate",
    "token-mis": "token_mask",
    "seq-tis": "sequence_truncate",
    "seq-mis": "sequence_mask",
}
_RC = "algorithm.rollout_correction"
_MIXED = "fsdp_config.mixed_precision"
_HALVES = ("bfloat16", "float16")


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
