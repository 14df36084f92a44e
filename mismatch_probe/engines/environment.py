"""What is installed, and what of it works here: the answer to `mismatch-probe env`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from mismatch_probe.engines import devices
from mismatch_probe.types import DTYPES

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


def inspect() -> dict[str, Any]:
    """Versions, machine, and per engine and dtype whether it is usable here or why not.

    Returns:
        `{"versions", "machine", "device", "engines": {name: {"usable", "why", "dtypes": {dtype: why not, or ""}}}}`.
    """
    found = _probe()
    engines = {
        "vllm": _engine(found.get("vllm", found["failure"]), found.get("dtypes", []), vllm=True),
        "hf": _engine(found.get("hf", found["failure"]), list(DTYPES), vllm=False),
    }
    return {
        "versions": devices.package_versions(),
        "machine": {**devices.machine(), "gpus": found.get("torch", {}).get("devices", [])},
        "device": found.get("platform"),
        "engines": engines,
    }


def _probe() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        return {"failure": "", **json.loads(lines[-1])}
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["the check ended without a word"])[-1]
        return {"failure": reason}


def _engine(failure: str, dtypes: list[str], *, vllm: bool) -> dict[str, Any]:
    if failure:
        missing = "No module named" in failure
        hint = devices.install_hint("cuda" if devices.gpu_present() else "cpu")
        fix = (
            hint
            if missing or not vllm
            else "Remove torchvision, torchaudio and torchcodec if they do not import: a text tool needs none."
        )
        return {
            "usable": False,
            "why": f"{failure.splitlines()[0]} {fix}",
            "dtypes": dict.fromkeys(DTYPES, "the engine is not usable"),
        }
    refused = "this device's build of vLLM does not offer it"
    return {"usable": True, "why": "", "dtypes": {d: "" if d in dtypes else refused for d in DTYPES}}
