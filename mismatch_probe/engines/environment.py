"""What is installed, and what of it works here: the answer to `mismatch-probe env`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mismatch_probe.engines import devices, registry
from mismatch_probe.errors import ProbeError
from mismatch_probe.types import DTYPES

_TIMEOUT_SECONDS = 120.0
_TIMED_OUT = f"The engine check did not finish within {_TIMEOUT_SECONDS:.0f} s."
# Runs in a child: importing both engines takes seconds, leaves global state behind, and can take the process down.
_PROBE = """
import json, sys
found = {}
import torch
count = torch.cuda.device_count()
found["torch"] = {
    "cuda": torch.cuda.is_available(),
    "devices": [torch.cuda.get_device_name(i) for i in range(count)],
}
try:
    import transformers
    transformers.LlamaConfig
    found["hf"] = ""
except Exception as error:
    found["hf"] = f"{type(error).__name__}: {error}"
try:
    import vllm
    from vllm.platforms import current_platform
    found["vllm"] = ""
    found["platform"] = current_platform.device_type
    found["dtypes"] = [str(d).removeprefix("torch.") for d in current_platform.supported_dtypes]
except Exception as error:
    found["vllm"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""


def memory_bytes(device: devices.Device) -> tuple[int, int] | None:
    """Memory of the machine, or of its largest GPU: all of it, and what is free now. None where it cannot be asked."""
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            total, free = max(tuple(int(n) << 20 for n in line.split(",")) for line in listed.splitlines() if line)
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        return total, free
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, ValueError, LookupError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))  # of a container
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, limit)


def inspect() -> dict[str, Any]:
    """Versions, machine, and per engine and dtype whether it is usable here or why not.

    Returns:
        `{"versions", "machine", "device", "engines": {name: {"usable", "why", "dtypes": {dtype: why not, or ""}}}}`.
    """
    found = _probe()
    why = {
        "vllm": _why_not(found.get("vllm", found["failure"]), vllm=True) or _device_refusal(),
        "hf": _why_not(found.get("hf", found["failure"]), vllm=False),
    }
    engines = {"vllm": _engine(why["vllm"], found.get("dtypes", [])), "hf": _engine(why["hf"], list(DTYPES))}
    return {
        "versions": devices.package_versions(),
        "machine": {**devices.machine().model_dump(), "gpus": found.get("torch", {}).get("devices", [])},
        "device": found.get("platform"),
        "engines": engines,
    }


def _probe() -> dict[str, Any]:
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failure": _TIMED_OUT}
    lines = done.stdout.strip().splitlines()
    try:
        return {"failure": "", **json.loads(lines[-1])}
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["the check printed nothing"])[-1]
        return {"failure": reason}


def _why_not(failure: str, *, vllm: bool) -> str:
    """What failed and what to do about it; empty where nothing did."""
    if not failure:
        return ""
    if failure == _TIMED_OUT:
        return f"{failure} Try again when the machine is less busy."
    if vllm and "No module named" not in failure:
        fix = "Uninstall torchvision, torchaudio and torchcodec if they fail to import; they are not needed."
    else:
        fix = devices.install_hint("cuda" if devices.gpu_present() else "cpu")
    return f"{failure.splitlines()[0]} {fix}"


def _device_refusal() -> str:
    """Why the build of vLLM that imports does not run on this machine, as its CUDA build without a GPU."""
    try:
        registry.find("vllm").choose_device("auto")
    except ProbeError as error:
        return str(error)
    return ""


def _engine(why: str, dtypes: list[str]) -> dict[str, Any]:
    if why:
        return {"usable": False, "why": why, "dtypes": dict.fromkeys(DTYPES, "the engine is not usable")}
    refused = "vLLM's build for this device does not support it"
    return {"usable": True, "why": "", "dtypes": {d: "" if d in dtypes else refused for d in DTYPES}}
