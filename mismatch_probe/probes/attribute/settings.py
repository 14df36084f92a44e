"""The settings of both sides that can make a gap, one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mismatch_probe.engines.attribute.variants import FP32_CLASSES, PassKind, TrainerVariant
from mismatch_probe.engines.vllm.unsupported import unsupported
from mismatch_probe.errors import UsageError
from mismatch_probe.probes.attribute.availability import (
    ALREADY,
    Context,
    cuda_only,
    no_attention,
    no_backend,
    no_chunks,
    no_head_dtype,
    no_int8,
    no_invariance,
    no_mode,
    no_tf32,
    not_16_bit,
    not_the_layout,
    same,
)
from mismatch_probe.probes.attribute.names import PREFILL, REPLAY, TRAINER
from mismatch_probe.results.attribution import Side
from mismatch_probe.types import TrainerMode

CHUNK = 64
# vLLM's general backends on CUDA (vllm/v1/attention/backends/registry.py).
_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
# Layouts that `compare` has; the others exist to be measured only.
_LAYOUTS = ("single", "padded", "packed")


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
        return self.why_not(context)

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
            lambda c: same(c.rollout_dtype, "float16") or unsupported(c.model, "float16"),
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


_PRECISION = {
    "norms": "norms",
    "attention": "q·k, softmax and their product with v",
    "rope": "rotary angles and rotation",
    "mlp": "MLPs",
    "residual": "the residual stream",
    "head": "the LM head",
}


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
