"""Configurations that do what an audit recommends, for TRL, verl and vLLM's command line.

Keys are those of TRL 1.16, verl 0.9.1 and vLLM 0.32; tests look each of them up in the installed package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mismatch_probe.config import RECORDED
from mismatch_probe.metrics.corrections import Correction
from mismatch_probe.metrics.floats import FIRST_SCALE
from mismatch_probe.probes.audit.advice import Choice

FRAMEWORKS = ("trl", "verl", "vllm")
_VERL_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
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
class Snippet:
    """A piece of configuration.

    Attributes:
        framework: One of `FRAMEWORKS`.
        values: What is set, by key.
        text: To be pasted.
        note: What the framework has no key for.
    """

    framework: str
    values: Mapping[str, Any]
    text: str
    note: str

    def as_dict(self) -> dict[str, Any]:
        return {"framework": self.framework, "text": self.text, "note": self.note}


def snippets(choice: Choice, model: str, temperature: float = 1.0) -> list[Snippet]:
    """The recommendation in each framework's own terms.

    Args:
        choice: The recommendation.
        model: The checkpoint's name.
        temperature: That was audited.
    """
    found = [_trl(choice, temperature), _verl(choice, temperature)]
    return found if choice.pair["rollout_dtype"] == RECORDED else [*found, _vllm(choice, model)]


def _trl(choice: Choice, temperature: float) -> Snippet:
    """Fields of `GRPOConfig`; weights are loaded in FP32, since mixed precision trains on FP32 masters."""
    dtype, correction = choice.pair["trainer_dtype"], choice.correction
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
    served = "" if choice.pair["rollout_dtype"] == RECORDED else f" --dtype {choice.pair['rollout_dtype']}"
    notes = [f"TRL has no key for vLLM's dtype: start its server with `trl vllm-serve --model MODEL{served}`."]
    if choice.pair["trainer_mode"] == "cast" and dtype in _HALVES:
        notes.append(
            "TRL trains under autocast with FP32 masters, and `cast` was audited: add --trainer-mode autocast."
        )
    if correction is not None and correction.name in _TRL_MODES:
        values["vllm_importance_sampling_mode"] = _TRL_MODES[correction.name]
        values["vllm_importance_sampling_clip_max"] = correction.high
        if correction.low:
            values["vllm_importance_sampling_clip_min"] = correction.low
    elif correction is not None:
        notes.append(f"TRL has no {correction.title}.")
    if choice.loss_scale is not None and choice.loss_scale != FIRST_SCALE:
        notes.append(
            f"For a first loss scale of 2^{choice.loss_scale} hand accelerate a GradScalerKwargs(init_scale=…)."
        )
    body = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    return Snippet("trl", values, f"GRPOConfig(\n{body})", " ".join(notes))


def _verl(choice: Choice, temperature: float) -> Snippet:
    """Overrides for `python3 -m verl.trainer.main_ppo`; `+` adds a key that its YAML does not spell out."""
    rollout, trainer = choice.pair["rollout_dtype"], choice.pair["trainer_dtype"]
    correction = choice.correction
    mixed = f"{{param_dtype:{_VERL_SHORT.get(trainer)},reduce_dtype:fp32,buffer_dtype:fp32}}"
    values: dict[str, Any] = {
        "actor_rollout_ref.rollout.name": "vllm",
        **({} if rollout == RECORDED else {"actor_rollout_ref.rollout.dtype": rollout}),
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.logprobs_mode": "processed_logprobs",
        "actor_rollout_ref.rollout.temperature": temperature,
        "actor_rollout_ref.rollout.top_p": 1.0,
        "actor_rollout_ref.rollout.top_k": -1,
        **({} if trainer == RECORDED else {f"+actor_rollout_ref.{side}.{_MIXED}": mixed for side in ("actor", "ref")}),
        **_verl_correction(correction),
    }
    notes = ["FSDP takes its precision from mixed_precision; fsdp_config.dtype changes nothing there."]
    if choice.loss_scale is not None and choice.loss_scale != FIRST_SCALE:
        notes.append(
            f"FSDP has no key for a first loss scale (2^{choice.loss_scale} is recommended); it backs off from "
            f"2^{FIRST_SCALE}."
        )
    lines = " \\\n".join(f"  {shlex.quote(f'{key}={_hydra(value)}')}" for key, value in values.items())
    return Snippet("verl", values, f"python3 -m verl.trainer.main_ppo \\\n{lines}", " ".join(notes))


def _verl_correction(correction: Correction | None) -> dict[str, Any]:
    if correction is None:
        return {f"{_RC}.rollout_is": None, f"{_RC}.rollout_rs": None}
    # Written with a decimal point, and in quotes, so that Hydra does not read 0.5_2 as a number.
    bounds = f'"{correction.low or 1e-9!r}_{correction.high!r}"'
    if correction.level == "geometric":
        return {f"{_RC}.rollout_is": None, f"{_RC}.rollout_rs": "seq_mean_k1", f"{_RC}.rollout_rs_threshold": bounds}
    threshold = bounds if correction.masks else correction.high
    return {f"{_RC}.rollout_is": correction.level, f"{_RC}.rollout_is_threshold": threshold, f"{_RC}.rollout_rs": None}


def _vllm(choice: Choice, model: str) -> Snippet:
    values = {
        "--dtype": choice.pair["rollout_dtype"],
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    flags = " ".join(f"{name} {value}" for name, value in values.items())
    text = f"vllm serve {shlex.quote(model)} {flags}"
    return Snippet("vllm", values, text, "Log-probs are those of the law that is sampled from.")


def _hydra(value: Any) -> str:
    return "null" if value is None else str(value)
