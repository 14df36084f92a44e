"""The settings of both sides that can make a gap, one by one, and why one does not exist here.

What exists is read from the installed packages' files and the device, without importing either engine. Line references
are to vLLM 0.32 and transformers 5.19. What asks answers with a reason, empty where the setting exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mismatch_probe.engines import registry
from mismatch_probe.engines.attribute.trace import layers_of
from mismatch_probe.engines.attribute.trainer import UNCHANGED
from mismatch_probe.engines.attribute.variants import FP32_CLASSES, PassKind, TrainerVariant
from mismatch_probe.engines.checkpoint import text_config
from mismatch_probe.errors import UsageError
from mismatch_probe.results.attribution import Side
from mismatch_probe.types import ROLLOUT_ENGINE, TrainerMode

# What settings are compared with: decoded again, by prefill, and the trainer once more.
REPLAY, PREFILL, TRAINER = "rollout-replay", "rollout-prefill", UNCHANGED
ALREADY = "it is set already"
"""The comparison ran with the setting."""
CHUNK = 64
# vLLM's general backends on CUDA (vllm/v1/attention/backends/registry.py).
_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
# Layouts that `compare` has; the others exist to be measured only.
_LAYOUTS = ("single", "padded", "packed")
_PRECISION = {
    "norms": "norms",
    "attention": "q·k, softmax and their product with v",
    "rope": "rotary angles and rotation",
    "mlp": "MLPs",
    "residual": "the residual stream",
    "head": "the LM head",
}


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
        rollout_engine: Name of the rollout engine.
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
    rollout_engine: str = ROLLOUT_ENGINE

    def why_no_dtype(self, dtype: str) -> str:
        """Why the rollout engine does not run the model in a dtype; empty where it does, as far as is known."""
        return registry.find(self.rollout_engine).why_no_dtype(self.model, dtype)

    @property
    def why_no_inside(self) -> str:
        """Why layers and routers of the rollout engine cannot be seen; empty where they can."""
        shown = registry.find(self.rollout_engine).shows_inside
        return "" if shown else f"the engine {self.rollout_engine} does not show its layers"

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
        if self.why_no_inside:
            return self.why_no_inside
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


@dataclass(frozen=True)
class Setting:
    """One setting of one side.

    Attributes:
        side: Whose.
        key: Its name; the same on both sides where it is the same setting.
        change: What it changes, as a phrase.
        why_not: Why it does not exist in a context; empty where it does.
        how: For the engine: how it goes over the tokens.
        arguments: For an engine of its own: what vLLM is given; None for the engine as it sampled.
        environment: Of that engine's process.
        dtype: Of that engine, where it is another.
        variant: For the trainer.
        slow: Not among the default ones, since it takes minutes.
        unchanged: The pass that it is compared with.
    """

    side: Side
    key: str
    change: str
    why_not: Callable[[Context], str] = field(default=lambda _: "")
    how: PassKind = "decode"
    arguments: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    variant: TrainerVariant | None = None
    slow: bool = False
    unchanged: str = REPLAY

    def why_missing(self, context: Context) -> str:
        """Why there is nothing to measure; empty where there is."""
        given = context.engine.get("arguments", {})
        if self.arguments and all(given.get(name) == value for name, value in self.arguments.items()):
            return ALREADY
        names = (*(self.arguments or {}), *self.environment)
        engine = registry.find(context.rollout_engine)
        return (names and engine.why_no_settings(names)) or self.why_not(context)

    @property
    def name(self) -> str:
        """Unique; also the file of its pass."""
        return f"{self.side}-{self.key}"

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `compare` that set it; none where there are none."""
        return tuple(_trainer_options(self.variant) if self.variant is not None else self._engine_options())

    def _engine_options(self) -> Iterator[str]:
        if self.dtype is not None:
            yield from ("--rollout-dtypes", self.dtype)
        if self.how == "decode-alone":
            yield from ("--rollout-batch", "1")
        for name, value in (self.arguments or {}).items():
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            yield from ("--eager",) if (name, value) == ("enforce_eager", True) else ("--engine-arg", f"{name}={text}")


def _trainer_options(variant: TrainerVariant) -> Iterator[str]:
    if variant.attention is not None:
        yield from ("--trainer-attn", variant.attention)
    if variant.layout in _LAYOUTS:
        yield from ("--trainer-layout", variant.layout)
    if variant.mode is not None:
        yield from ("--trainer-mode", variant.mode)
    if variant.dtype is not None:
        yield from ("--trainer-dtypes", variant.dtype)


def settings_of(context: Context) -> list[Setting]:
    """Every setting of both sides, whether it exists here or not."""
    return [*_rollout_settings(context), *_trainer_settings(context)]


def choose(settings: Sequence[Setting], wanted: Sequence[str]) -> list[Setting]:
    """The settings that are asked for.

    Args:
        settings: All.
        wanted: `default`, `all`, `none`, keys (both sides), or `rollout:key`, `trainer:key`.

    Raises:
        UsageError: A name is none of those.
    """
    found: list[Setting] = []
    for name in wanted:
        side, _, key = name.rpartition(":")
        if name == "none":
            continue
        if name in ("default", "all"):
            matching = [setting for setting in settings if name == "all" or not setting.slow]
        else:
            matching = [setting for setting in settings if setting.key == key and side in ("", setting.side)]
            if not matching:
                known = ", ".join(sorted({setting.key for setting in settings}))
                raise UsageError(
                    f"--settings does not know {name!r}.",
                    f"Known are default, all, none, and: {known}; write rollout: or trainer: before one for one side.",
                )
        found += [setting for setting in matching if setting not in found]
    return found


def _rollout_settings(context: Context) -> list[Setting]:
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


def _trainer_settings(context: Context) -> list[Setting]:
    def setting(
        key: str, change: str, why_not: Callable[[Context], str] | None = None, *, slow: bool = False, **variant: Any
    ) -> Setting:
        made = TrainerVariant(f"trainer-{key}", **variant)
        return Setting("trainer", key, change, why_not or (lambda _: ""), variant=made, slow=slow, unchanged=TRAINER)

    other: TrainerMode = "cast" if context.trainer_mode == "autocast" else "autocast"
    layouts = {
        "single": "one sequence a forward pass",
        "padded": "padded on the right",
        "left-padded": "padded on the left",
        "packed": "packed, with position ids",
    }
    return [
        *(
            setting(f"attention-{name}", f"attention {name}", no_attention(name), attention=name)
            for name in ("eager", "sdpa", "flash_attention_2")
        ),
        *(setting(f"layout-{name}", text, not_the_layout(name), layout=name) for name, text in layouts.items()),
        setting(other, f"{other} in the same dtype", no_mode, mode=other),
        *(setting(f"fp32-{name}", f"{_PRECISION[name]} in FP32", not_16_bit, fp32=(name,)) for name in FP32_CLASSES),
        setting("softmax-16", "the last log-softmax in 16 bit", not_16_bit, softmax_in_dtype=True),
        setting("kv-fp8", "keys and values rounded through FP8", kv_fp8=True),
        setting("float16", "FP16", lambda c: same(c.trainer_dtype, "float16"), dtype="float16"),
        setting("compiled", "under torch.compile", slow=context.device == "cpu", compiled=True),
        setting("tf32", "FP32 products in TF32", no_tf32, tf32=True),
    ]
