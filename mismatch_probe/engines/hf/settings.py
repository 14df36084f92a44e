"""Flags and environment of a trainer process by device and dtype, each with its reason and the source that it follows.

Line references are to torch 2.13 and transformers 5.19.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mismatch_probe.engines.devices import Device, EngineSettings, default_device, install_hint
from mismatch_probe.errors import EngineMissing
from mismatch_probe.types import TrainerDtype


def choose_device(requested: str) -> Device:
    """A GPU where there is one and torch is built for it.

    Raises:
        UsageError: The device is not here.
        EngineMissing: torch is not installed, or not built for the device that is asked for.
    """
    device = default_device(requested)
    try:
        for_cpu = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        raise EngineMissing("torch is not installed.", install_hint(device)) from None
    if device == "cuda" and for_cpu and requested == "cuda":
        raise EngineMissing("--device cuda needs torch's CUDA build; the CPU build is installed.", install_hint("cuda"))
    return "cpu" if for_cpu else device


def trainer_settings(device: Device, dtype: TrainerDtype) -> EngineSettings:
    """Torch flags and environment of a trainer process.

    Strict flags belong to FP32 and float64 passes: a 16-bit pass keeps torch's defaults, as the user's trainer does.
    """
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    flags: dict[str, Any] = {}
    if device == "cuda" and dtype in ("float32", "float64"):
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
        flags = {
            # torch/__init__.py: "highest" keeps FP32 products in FP32; "high" would allow TF32.
            "float32_matmul_precision": "highest",
            # torch/backends/cudnn: convolutions use TF32 by default (state-space models have them).
            "cudnn_allow_tf32": False,
            # torch/backends/cuda: both default to True and let split-K sums of 16-bit products round to 16 bit. An FP32
            # pass has no such product unless a checkpoint brings its own; then it shall not matter.
            "allow_bf16_reduced_precision_reduction": False,
            "allow_fp16_reduced_precision_reduction": False,
            # transformers/integrations/sdpa_attention.py asks torch to broadcast grouped heads where there is no mask.
            # Of torch's CUDA kernels only FlashAttention does that, and it takes no FP32: the math kernel would then
            # hold heads × T × T scores. With heads repeated the memory-efficient kernel runs.
            "sdpa_broadcasts_grouped_heads": False,
        }
    return EngineSettings(flags, environment, reusable=device == "cpu")
