"""Settings of the rollout engine: how it goes over the tokens, and what vLLM is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mismatch_probe.probes.attribute.settings import ALREADY, PREFILL, Context, Setting, same, settings

CHUNK = 64
# vLLM's general backends on CUDA (vllm/v1/attention/backends/registry.py).
_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")


@settings
def rollout_settings(context: Context) -> list[Setting]:
    eager = bool(context.engine.get("enforce_eager", context.device == "cpu"))
    compiled = Setting(
        "rollout",
        "eager" if not eager else "compiled",
        "no compilation, no CUDA graphs" if not eager else "vLLM compiled",
        arguments={"enforce_eager": not eager},
        slow=eager,
    )
    return [
        Setting("rollout", "batch-1", "one request in the engine at a time", how="decode-alone"),
        Setting(
            "rollout", "prefill-alone", "by prefill, one sequence at a time", how="prefill-alone", unchanged=PREFILL
        ),
        Setting(
            "rollout",
            "prefix-cache",
            "decoded from a warm prefix cache",
            how="decode-warm",
            arguments=None if context.engine.get("prefix_caching", True) else {"enable_prefix_caching": True},
        ),
        Setting(
            "rollout",
            "chunked-prefill",
            f"prefill in chunks of {CHUNK} tokens",
            no_chunks,
            how="prefill",
            arguments={"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK},
            unchanged=PREFILL,
        ),
        compiled,
        Setting(
            "rollout",
            "kv-fp8",
            "KV cache in FP8",
            lambda c: ALREADY if "fp8" in str(c.engine.get("kv_cache_dtype")) else "",
            arguments={"kv_cache_dtype": "fp8"},
        ),
        Setting(
            "rollout",
            "fp32-head",
            "LM head in FP32",
            no_head_dtype,
            arguments={"hf_overrides": {"head_dtype": "float32"}},
        ),
        Setting(
            "rollout",
            "float16",
            "FP16",
            lambda c: same(c.rollout_dtype, "float16") or c.why_no_dtype("float16"),
            arguments={},
            dtype="float16",
        ),
        *(
            Setting(
                "rollout",
                f"attention-{name.lower()}",
                f"attention backend {name}",
                no_backend(name),
                arguments={"attention_backend": name},
            )
            for name in _BACKENDS
        ),
        Setting(
            "rollout",
            "batch-invariant",
            "batch-invariant kernels",
            no_invariance,
            arguments={},
            environment={"VLLM_BATCH_INVARIANT": "1"},
        ),
        Setting(
            "rollout",
            "weights-fp8",
            "weights in FP8",
            cuda_only("the CPU build has no FP8 products (static_scaled_fp8_quant is not in it)"),
            arguments={"quantization": "fp8"},
        ),
        Setting(
            "rollout",
            "weights-int8",
            "experts' weights in INT8",
            no_int8,
            arguments={"quantization": "int8_per_channel_weight_only"},
        ),
        Setting(
            "rollout",
            "tensor-parallel",
            "split over 2 GPUs",
            lambda c: "" if c.gpus > 1 else f"it needs two GPUs, and there {'is one' if c.gpus else 'is none'}",
            arguments={"tensor_parallel_size": 2},
        ),
    ]


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


@cache
def _vllm_source(name: str) -> str:
    """A file of the installed vLLM; empty where it is not there."""
    spec = find_spec("vllm")  # of a package without a parent nothing is imported
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""
