"""The settings of both sides that can make a gap, one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mismatch_probe.engines.attribute.variants import FP32_CLASSES, Take, TrainerVariant
from mismatch_probe.engines.refusals import refusal
from mismatch_probe.errors import UsageError
from mismatch_probe.probes.attribute.availability import (
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

Side = Literal["rollout", "trainer"]
CHUNK = 64
# vLLM's general backends on CUDA (vllm/v1/attention/backends/registry.py).
_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")


@dataclass(frozen=True)
class Knob:
    """One setting of one side.

    Attributes:
        side: Whose.
        key: Its name; the same on both sides where it is the same setting.
        change: What it changes, as a phrase.
        why_not: Why it does not exist in a context; empty where it does.
        take: For the engine: how it goes over the tokens.
        arguments: For an engine of its own: what vLLM is given; None for the baseline's engine.
        environment: Of that engine's process.
        dtype: Of that engine, where it is another.
        variant: For the trainer.
        slow: Not among the default ones, since it takes minutes.
        baseline: The reading that it is compared with.
        action: What to do where it matters.
    """

    side: Side
    key: str
    change: str
    action: str
    why_not: Callable[[Context], str] = field(default=lambda _: "")
    take: Take = "decode"
    arguments: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    variant: TrainerVariant | None = None
    slow: bool = False
    baseline: str = REPLAY

    def why_missing(self, context: Context) -> str:
        """Why there is nothing to measure; empty where there is."""
        given = context.engine.get("arguments", {})
        if self.arguments and all(given.get(name) == value for name, value in self.arguments.items()):
            return "it is the baseline's"
        return self.why_not(context)

    @property
    def name(self) -> str:
        """Unique; also its reading's file."""
        return f"{self.side}-{self.key}"


def knobs_of(context: Context) -> list[Knob]:
    """Every knob of both sides, whether it exists here or not."""
    return [*_rollout_knobs(context), *_trainer_knobs(context)]


def choose(knobs: Sequence[Knob], wanted: Sequence[str]) -> list[Knob]:
    """The knobs that are asked for.

    Args:
        knobs: All.
        wanted: `default`, `all`, `none`, keys (both sides), or `rollout:key`, `trainer:key`.

    Raises:
        UsageError: A name is none of those.
    """
    found: list[Knob] = []
    for name in wanted:
        side, _, key = name.rpartition(":")
        if name == "none":
            continue
        if name in ("default", "all"):
            matching = [knob for knob in knobs if name == "all" or not knob.slow]
        else:
            matching = [knob for knob in knobs if knob.key == key and side in ("", knob.side)]
            if not matching:
                known = ", ".join(sorted({knob.key for knob in knobs}))
                raise UsageError(
                    f"--knobs knows no {name!r}.",
                    f"Known are default, all, none, and: {known}; rollout: or trainer: before one.",
                )
        found += [knob for knob in matching if knob not in found]
    return found


def _rollout_knobs(context: Context) -> list[Knob]:
    eager = bool(context.engine.get("enforce_eager", context.device == "cpu"))
    compiled = Knob(
        "rollout",
        "eager" if not eager else "compiled",
        "no compilation, no CUDA graphs" if not eager else "vLLM compiled",
        "compilation moves log-probs: run rollouts as eager, or accept its part",
        arguments={"enforce_eager": not eager},
        slow=eager,
    )
    return [
        Knob("rollout", "batch-1", "one request in the engine at a time", _BATCH, take="decode-alone"),
        Knob(
            "rollout",
            "prefill-alone",
            "by prefill, one sequence at a time",
            _BATCH,
            take="prefill-alone",
            baseline=PREFILL,
        ),
        Knob(
            "rollout",
            "prefix-cache",
            "decoded from a warm prefix cache",
            "a stale or inexact prefix cache: reset it after weight updates, or turn it off",
            take="decode-warm",
            arguments=None if context.engine.get("prefix_caching", True) else {"enable_prefix_caching": True},
        ),
        Knob(
            "rollout",
            "chunked-prefill",
            f"prefill in chunks of {CHUNK} tokens",
            "chunk size moves log-probs: keep it the same where log-probs are compared",
            why_not=no_chunks,
            take="prefill",
            arguments={"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK},
            baseline=PREFILL,
        ),
        compiled,
        Knob(
            "rollout",
            "kv-fp8",
            "KV cache in FP8",
            "an FP8 KV cache: keep the cache in the model's dtype for RL",
            arguments={"kv_cache_dtype": "fp8"},
            why_not=lambda c: "the KV cache is in FP8 already" if "fp8" in str(c.engine.get("kv_cache_dtype")) else "",
        ),
        Knob(
            "rollout",
            "fp32-head",
            "LM head in FP32",
            "the LM head: give both sides an FP32 head (vLLM: hf_overrides={'head_dtype': 'float32'})",
            arguments={"hf_overrides": {"head_dtype": "float32"}},
            why_not=no_head_dtype,
        ),
        Knob(
            "rollout",
            "float16",
            "FP16",
            "16-bit rounding: run both sides in FP16, if `audit` lets the model",
            arguments={},
            dtype="float16",
            why_not=lambda c: same(c.rollout_dtype, "float16") or refusal(c.model, "float16"),
        ),
        *(
            Knob(
                "rollout",
                f"attention-{name.lower()}",
                f"attention backend {name}",
                f"the attention kernel: pin the backend, {name} where it is closer",
                arguments={"attention_backend": name},
                why_not=no_backend(name),
            )
            for name in _BACKENDS
        ),
        Knob(
            "rollout",
            "batch-invariant",
            "batch-invariant kernels",
            "batch-variant kernels: VLLM_BATCH_INVARIANT=1",
            arguments={},
            environment={"VLLM_BATCH_INVARIANT": "1"},
            why_not=no_invariance,
        ),
        Knob(
            "rollout",
            "weights-fp8",
            "weights in FP8",
            "FP8 weights: do not quantise the rollout's weights, or correct for it",
            arguments={"quantization": "fp8"},
            why_not=cuda_only("the CPU build has no FP8 products (static_scaled_fp8_quant is not in it)"),
        ),
        Knob(
            "rollout",
            "weights-int8",
            "experts' weights in INT8",
            "INT8 experts: do not quantise the rollout's weights, or correct for it",
            arguments={"quantization": "int8_per_channel_weight_only"},
            why_not=no_int8,
        ),
        Knob(
            "rollout",
            "tensor-parallel",
            "split over 2 GPUs",
            "the split of matrix products: compare with the tensor-parallel size that rollouts use",
            arguments={"tensor_parallel_size": 2},
            why_not=lambda c: "" if c.gpus > 1 else f"it needs two GPUs, and there {'is one' if c.gpus else 'is none'}",
        ),
    ]


_BATCH = "kernels that depend on the batch: batch-invariant mode (CUDA), or importance weights"
_PRECISION = {
    "norms": "norms",
    "attention": "q·k, softmax and their product with v",
    "rope": "rotary angles and rotation",
    "mlp": "MLPs",
    "residual": "the residual stream",
    "head": "the LM head",
}


def _trainer_knobs(context: Context) -> list[Knob]:
    def knob(
        key: str,
        change: str,
        action: str,
        why_not: Callable[[Context], str] | None = None,
        *,
        slow: bool = False,
        **variant: Any,
    ) -> Knob:
        made = TrainerVariant(f"trainer-{key}", **variant)
        return Knob(
            "trainer", key, change, action, why_not or (lambda _: ""), variant=made, slow=slow, baseline=TRAINER
        )

    other: Any = "cast" if context.trainer_mode == "autocast" else "autocast"
    layouts = {
        "single": "one sequence a forward pass",
        "padded": "padded on the right",
        "left-padded": "padded on the left",
        "packed": "packed, with position ids",
    }
    return [
        *(
            knob(
                f"attention-{name}",
                f"attention {name}",
                f"attention kernels: train with {name}, if it is closer",
                no_attention(name),
                attention=name,
            )
            for name in ("eager", "sdpa", "flash_attention_2")
        ),
        *(
            knob(
                f"layout-{name}",
                text,
                f"the layout of batches: train {name}, if it is closer",
                not_the_layout(name),
                layout=name,
            )
            for name, text in layouts.items()
        ),
        knob(
            other,
            f"{other} in the same dtype",
            f"how the trainer holds its weights: {other}, if it is closer",
            no_mode,
            mode=other,
        ),
        *(
            knob(
                f"fp32-{name}",
                f"{_PRECISION[name]} in FP32",
                f"in FP32 at the trainer: {_PRECISION[name]}",
                not_16_bit,
                fp32=(name,),
            )
            for name in FP32_CLASSES
        ),
        knob(
            "softmax-16",
            "the last log-softmax in 16 bit",
            "a log-softmax in 16 bit: upcast logits first",
            not_16_bit,
            softmax_in_dtype=True,
        ),
        knob("kv-fp8", "keys and values rounded through FP8", "keys and values in FP8 on one side alone", kv_fp8=True),
        knob(
            "float16",
            "FP16",
            "16-bit rounding: run both sides in FP16, if `audit` lets the model",
            lambda c: same(c.trainer_dtype, "float16"),
            dtype="float16",
        ),
        knob(
            "compiled",
            "under torch.compile",
            "torch.compile moves log-probs: score as the trainer trains",
            slow=context.device == "cpu",
            compiled=True,
        ),
        knob(
            "tf32", "FP32 products in TF32", "TF32: torch.set_float32_matmul_precision('highest')", no_tf32, tf32=True
        ),
    ]
