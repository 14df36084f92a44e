"""Settings of the trainer: dtype, mode, layout, attention, modules in FP32, and what its kernels round."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from mismatch_probe.engines.attribute.variants import FP32_CLASSES, TrainerVariant
from mismatch_probe.probes.attribute.settings import ALREADY, TRAINER, Context, Setting, same, settings
from mismatch_probe.types import TrainerMode

_PRECISION = {
    "norms": "norms",
    "attention": "q·k, softmax and their product with v",
    "rope": "rotary angles and rotation",
    "mlp": "MLPs",
    "residual": "the residual stream",
    "head": "the LM head",
}


@settings
def trainer_settings(context: Context) -> list[Setting]:
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
