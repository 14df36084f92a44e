"""From what an engine raises to what its user can do: one sentence each."""

from __future__ import annotations

import errno
import re

from mismatch_probe.engines.base import Job
from mismatch_probe.errors import DiskFull, DtypeRefused, EngineError, EngineMissing, ModelError, ProbeError

_DTYPE = re.compile(r"model type '(?P<model>[^']+)' does not support (?P<dtype>b?float\d+)\. Reason: (?P<why>[^\n\[]+)")
_WEIGHTS = re.compile(
    r"deserializing header|referenced in index but missing|safetensors.*(No such file|not found)", re.DOTALL
)
_ARCHITECTURE = re.compile(
    r"does not recognize this architecture|Model architectures .* (are not supported|failed to be inspected)|"
    r"Model architecture \w+ was supported in vLLM until"
)
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|No available memory for the cache|"
    r"larger than the available KV cache memory|less than desired GPU memory utilization",
    re.IGNORECASE,
)
_CODE = re.compile(r"trust_remote_code", re.IGNORECASE)


def classify(error: BaseException, job: Job) -> ProbeError | None:
    """The error as the user's, or None when it is an unexpected one."""
    if isinstance(error, ProbeError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _MEMORY.search(text):
        return EngineError(f"{job.subject} ran out of memory.", job.memory_advice)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DiskFull(f"The disk is full: {job.subject} stopped.", "Free space, then continue with --resume.")
    refused = _DTYPE.search(text)
    if refused:
        why = refused["why"].strip().rstrip(".")
        return DtypeRefused(
            f"vLLM does not support {refused['dtype']} for model type {refused['model']}: {why}.",
            "Leave this dtype out, or try a newer vLLM.",
        )
    if type(error).__name__ == "SafetensorError" or _WEIGHTS.search(text):
        return ModelError(
            f"A weight file of {job.model_path} is missing or damaged: {first_line(error)}.",
            f"Run `mismatch-probe preflight {job.model_path}` to see which, and restore it.",
        )
    if _ARCHITECTURE.search(text):
        return ModelError(
            f"The installed versions do not support this model: {first_line(error)}",
            "Use a model or versions that both engines support; `mismatch-probe env` lists what is installed.",
        )
    if isinstance(error, ImportError):
        return EngineMissing(
            f"{job.subject} failed to import a module: {text or type(error).__name__}.",
            "Run `mismatch-probe env` to see what is missing.",
        )
    if _CODE.search(text) and not job.trust_remote_code:
        return ModelError(
            f"The checkpoint {job.model_path} contains Python code that loading would run.",
            "Read that code, then add --trust-remote-code where the command has that option.",
        )
    return None


def told(error: BaseException, job: Job) -> str:
    """What went wrong, in a user's words where they are known."""
    known = classify(error, job)
    return known.what if known else first_line(error)


def first_line(error: BaseException) -> str:
    """The error in one line, with its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def unexpected(error: str, job: Job, log: str) -> EngineError:
    """An engine failure of no known kind: its last words, and where the whole story is."""
    return EngineError(f"{job.subject} failed: {error}", f"The engine's log is {log}.")
