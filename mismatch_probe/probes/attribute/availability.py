"""Whether a setting exists here, and why it does not.

What exists is read from the installed packages' files and the device, without importing either engine. Line references
are to vLLM 0.32 and transformers 5.19. Every function answers with a reason, empty where the setting exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mismatch_probe.engines.attribute.trace import layers_of
from mismatch_probe.engines.checkpoint import text_config

ALREADY = "it is set already"
"""The comparison ran with the setting."""


@dataclass(frozen=True)
class Context:
    """What decides which settings exist.

    Attributes:
        device: `cpu` or `cuda`.
        gpus: How many.
        rollout_dtype, trainer_dtype: Of the pair.
        trainer_mode: `cast` or `autocast`.
        trainer_layout: `single`, `padded` or `packed`.
        model: The checkpoint's `config.json`.
        engine: What the rollout pass said of itself; empty where it has not run.
        attention: What the trainer pass said of its attention; empty where it has not run.
    """

    device: str
    gpus: int
    rollout_dtype: str
    trainer_dtype: str
    trainer_mode: str
    trainer_layout: str
    model: Mapping[str, Any]
    engine: Mapping[str, Any] = field(default_factory=dict)
    attention: str = ""

    @property
    def nested(self) -> Mapping[str, Any]:
        """The text model's part of the configuration."""
        return text_config(self.model)

    @property
    def mixed(self) -> bool:
        """Whether the two sides have different dtypes."""
        return self.rollout_dtype != self.trainer_dtype

    @property
    def layers(self) -> int:
        """Decoder layers, 0 where the configuration does not say."""
        return layers_of(self.model)

    @property
    def experts_per_token(self) -> int:
        """Experts of a token, 0 where the configuration does not say."""
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
        return next((int(self.nested[name]) for name in names if self.nested.get(name)), 0)

    @property
    def why_no_routes(self) -> str:
        """Why routes cannot be read off a router's logits; empty where they can."""
        if not self.experts_per_token or not self.layers:
            return "the checkpoint's config.json does not say how many experts a token has"
        grouped = int(self.nested.get("n_group") or 1) > 1 or self.nested.get("scoring_func") == "sigmoid"
        if grouped or self.nested.get("topk_method") == "noaux_tc":
            return "its routers choose by more than their logits (groups, a correction), which is not read here"
        return ""

    @property
    def experts(self) -> int:
        """Experts of a layer, 0 where it has none."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return next((int(self.nested[name]) for name in names if self.nested.get(name)), 0)


def same(dtype: str, wanted: str) -> str:
    return f"it is in {wanted} already" if dtype == wanted else ""


def cuda_only(why: str) -> Callable[[Context], str]:
    return lambda context: "" if context.device == "cuda" else why


def no_backend(name: str) -> Callable[[Context], str]:
    def why(context: Context) -> str:
        if context.device == "cpu":
            return "a CPU has one backend, CPU_ATTN"
        if name in context.engine.get("attention_backends", ()):
            return ALREADY
        if context.rollout_dtype == "float32" and name in ("FLASH_ATTN", "FLASHINFER"):
            return "it takes no float32"
        if name == "FLASHINFER" and find_spec("flashinfer") is None:
            return "the package flashinfer is not installed"
        return ""

    return why


def no_invariance(context: Context) -> str:
    if context.device == "cpu":
        return "its kernels are Triton's and FlashAttention's, which a CPU does not run"
    return "" if "VLLM_BATCH_INVARIANT" in _vllm_source("envs.py") else "the installed vLLM has no such mode"


def no_head_dtype(context: Context) -> str:
    if "head_dtype" in (context.engine.get("arguments", {}).get("hf_overrides") or {}):
        return ALREADY
    if context.rollout_dtype == "float32":
        return "it is in float32 already"
    return "" if "def head_dtype" in _vllm_source("config/model.py") else "the installed vLLM has no head_dtype"


def no_int8(context: Context) -> str:
    if not context.experts:
        return "its INT8 covers experts, and the model has none"
    return cuda_only("the CPU build leaves experts as they are")(context)


def no_chunks(context: Context) -> str:
    return "vLLM splits no prompt of this model" if context.nested.get("is_encoder_decoder") else ""


def no_attention(name: str) -> Callable[[Context], str]:
    def why(context: Context) -> str:
        if name == context.attention:
            return ALREADY
        if name.startswith("flash"):
            if context.device == "cpu":
                return "FlashAttention runs on GPUs"
            if find_spec("flash_attn") is None:
                return "the package flash-attn is not installed"
            if context.trainer_dtype == "float32":
                return "it takes no float32"
        return ""

    return why


def not_the_layout(name: str) -> Callable[[Context], str]:
    return lambda context: ALREADY if context.trainer_layout == name else ""


def no_mode(context: Context) -> str:
    return "float32 has no autocast" if context.trainer_dtype == "float32" else ""


def not_16_bit(context: Context) -> str:
    return "the trainer is in float32 already" if context.trainer_dtype == "float32" else ""


def no_tf32(context: Context) -> str:
    if context.device == "cpu":
        return "TF32 is a mode of GPUs"
    return "" if context.trainer_dtype == "float32" else "it concerns float32 passes, and the trainer's is not one"


@cache
def _vllm_source(name: str) -> str:
    """A file of the installed vLLM; empty where it is not there."""
    spec = find_spec("vllm")  # of a package without a parent nothing is imported
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""
