"""Every choice that depends on the device alone, with its reason; what is installed, the machine, and its memory.

Nothing here imports torch or vLLM, so all of it is tested without a GPU; what only a GPU can show is tested under the
marker `gpu`. Arguments and flags of an engine are its own: `vllm/settings.py`, `hf/settings.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal

from mismatch_probe.config import Sizes
from mismatch_probe.errors import UsageError
from mismatch_probe.results.manifest import Determinism, Environment, Machine

Device = Literal["cpu", "cuda"]
GIB = 1 << 30
# Recorded by allow-list: an environment also holds tokens.
_RECORDED = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE", "TRITON_F32_DEFAULT")
_RECORDED_PREFIX = (
    "VLLM_CPU_",
    "VLLM_FLASH_ATTN",
    "VLLM_ATTENTION",
    "VLLM_BATCH_INVARIANT",
    "VLLM_USE_",
    "VLLM_ENABLE_",
    "VLLM_FLOAT32",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_",
    "CUBLAS_",
)


@dataclass(frozen=True)
class EngineSettings:
    """What a process of an engine gets.

    Attributes:
        arguments: Keyword arguments of the engine.
        environment: Variables set before its imports.
        reusable: Whether a process may go on with the next job that wants the same environment: only where that job's
            numbers are known to be those of a process of its own, to the bit.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    reusable: bool = False


@cache
def gpu_names() -> tuple[str, ...]:
    """The GPUs that `nvidia-smi` lists. Asked this way because importing torch would take seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = listing.stdout.splitlines() if listing.returncode == 0 else []
    # "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-…)": the identifier stays out of manifests.
    return tuple(
        line.split(": ", 1)[1].split(" (UUID", 1)[0] for line in lines if line.startswith("GPU ") and ": " in line
    )


def gpu_present() -> bool:
    """Whether `nvidia-smi` lists a GPU."""
    return bool(gpu_names())


def default_device(requested: str) -> Device:
    """`--device` of an engine that runs on either: a GPU where there is one.

    Raises:
        UsageError: The device is not here.
    """
    if requested == "cuda" and not gpu_present():
        raise UsageError("--device cuda needs a GPU, and nvidia-smi lists none.", "Use --device cpu or --device auto.")
    return "cuda" if requested != "cpu" and gpu_present() else "cpu"


def install_hint(device: Device) -> str:
    """The line that installs an engine for the device."""
    if device == "cuda":
        return 'Run: pip install "mismatch-probe[cuda]".'
    return 'Run: pip install --extra-index-url https://download.pytorch.org/whl/cpu "mismatch-probe[cpu]".'


@cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies BF16 natively; without it 16-bit products take about ten times as long as FP32's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            words = set(handle.read().split())
    except OSError:
        return platform.system() == "Darwin"
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & words)


def default_sizes(device: Device) -> Sizes:
    """Sizes that end within 6 minutes on 2 CPU cores, and that use a GPU well.

    On a CPU tokens go to many prompts rather than to long responses: the prompt is the unit of every interval. A CPU
    without BF16 instructions emulates both 16-bit types and gets shorter responses.
    """
    if device == "cuda":
        return Sizes(64, 4, 1024, rollout_batch=256, self_noise_tokens=64, memory_budget_gib=8.0)
    if cpu_has_bf16():
        return Sizes(64, 1, 32, rollout_batch=32, self_noise_tokens=8, memory_budget_gib=1.0)
    return Sizes(64, 1, 12, rollout_batch=16, self_noise_tokens=8, memory_budget_gib=1.0)


def determinism(device: Device, *, in_process: bool) -> Determinism:
    """Whether a repeat of a pass on the same machine is promised to give the same bits, and why."""
    if device == "cpu" and in_process:
        why = "in-process engine on a CPU: same admission order, same batches, same kernels"
        return Determinism(promised=True, why=why)
    if device == "cpu":
        why = "engine process: requests reach the running core one at a time, so batches can differ"
        return Determinism(promised=False, why=why)
    return Determinism(promised=False, why="CUDA kernels may reduce in another order from run to run")


def package_versions() -> dict[str, str]:
    """Versions of the packages that a log-prob depends on."""
    from importlib.metadata import version

    found = {}
    for name in (
        "mismatch-probe",
        "torch",
        "transformers",
        "vllm",
        "vllm-cpu",
        "tokenizers",
        "triton",
        "flash-attn",
        "numpy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def recorded_environment() -> dict[str, str]:
    """Environment switches that can change a log-prob."""
    return {k: v for k, v in sorted(os.environ.items()) if k in _RECORDED or k.startswith(_RECORDED_PREFIX)}


def machine() -> Machine:
    """Processor, cores that this process may use, GPUs and platform."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            name = next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(
        cpu=name,
        cores=cores,
        bf16_instructions=cpu_has_bf16(),
        gpus=gpu_names(),
        platform=platform.platform(),
    )


def environment() -> Environment:
    """What a document records of packages, machine and variables."""
    return Environment(versions=package_versions(), machine=machine(), variables=recorded_environment())


def running() -> dict[str, Any]:
    """What a worker process adds to its engine's identity: a resumed run can mix machines and versions."""
    found = environment().model_dump(mode="json")
    return {"versions": found["versions"], "machine": found["machine"], "environment": found["variables"]}


def reset_peak(device: Any) -> None:
    """Starts a stretch.

    Args:
        device: A torch device.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # proc(5): 5 resets the peak resident set size
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: Any) -> int | None:
    """The most memory that the stretch held: of the device, or resident in the process on a CPU; None where unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resident_peak()


def resident_peak() -> int | None:
    """Bytes that this process had in memory at its most, since it began or `reset_peak`; None where unknown."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    return None
