"""Configurations that do what an audit recommends, for TRL, verl and vLLM's command line.

Keys are those of TRL 1.16, verl 0.9.1 and vLLM 0.32; tests look each of them up in the installed package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mismatch_probe.metrics.corrections import Correction
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


def snippets(choice: Choice, model: str) -> list[Snippet]:
    """The recommendation in each framework's own terms.

    Args:
        choice: The recommendation.
        model: The checkpoint's name.
    """
    return [_trl(choice), _verl(choice), _vllm(choice, model)]


def _trl(choice: Choice) -> Snippet:
    """Fields of `GRPOConfig`; weights are loaded in FP32, since mixed precision trains on FP32 masters."""
    dtype, correction = choice.pair["trainer_dtype"], choice.correction
    values: dict[str, Any] = {
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "model_init_kwargs": {"dtype": "float32"},
        "use_vllm": True,
        "vllm_mode": "server",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "vllm_importance_sampling_correction": correction is not None and correction.name in _TRL_MODES,
    }
    notes = [
        "TRL has no key for vLLM's dtype: start its server with "
        f"`trl vllm-serve --model MODEL --dtype {choice.pair['rollout_dtype']}`."
    ]
    if correction is not None and correction.name in _TRL_MODES:
        values["vllm_importance_sampling_mode"] = _TRL_MODES[correction.name]
        values["vllm_importance_sampling_clip_max"] = correction.high
        if correction.low:
            values["vllm_importance_sampling_clip_min"] = correction.low
    elif correction is not None:
        notes.append(f"TRL has no {correction.title}.")
    if choice.loss_scale is not None and choice.loss_scale != 16:
        notes.append(
            f"For a first loss scale of 2^{choice.loss_scale} hand accelerate a GradScalerKwargs(init_scale=…)."
        )
    body = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    return Snippet("trl", values, f"GRPOConfig(\n{body})", " ".join(notes))


def _verl(choice: Choice) -> Snippet:
    """Overrides for `python3 -m verl.trainer.main_ppo`; `+` adds a key that its YAML does not spell out."""
    trainer, correction = _VERL_SHORT[choice.pair["trainer_dtype"]], choice.correction
    mixed = f"{{param_dtype:{trainer},reduce_dtype:fp32,buffer_dtype:fp32}}"
    values: dict[str, Any] = {
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.dtype": choice.pair["rollout_dtype"],
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.logprobs_mode": "processed_logprobs",
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.top_p": 1.0,
        "actor_rollout_ref.rollout.top_k": -1,
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision": mixed,
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision": mixed,
        **_verl_correction(correction),
    }
    notes = ["FSDP takes its precision from mixed_precision; fsdp_config.dtype changes nothing there."]
    if choice.loss_scale is not None and choice.loss_scale != 16:
        notes.append(
            f"FSDP has no key for a first loss scale (2^{choice.loss_scale} is recommended); it backs off from 2^16."
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
    return (
        {None: "null", True: "True", False: "False"}.get(value, str(value))
        if not isinstance(value, float)
        else str(value)
    )
