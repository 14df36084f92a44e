"""From an engine's log to the exception that ended it.

vLLM starts processes of its own. What fails there is written to the log, and the parent gets a wrapper: "Engine core
initialization failed" (vLLM 0.32, v1/engine/utils.py). Nothing here imports an engine.
"""

from __future__ import annotations

import builtins
import re
from dataclasses import dataclass
from pathlib import Path

# "(Worker pid=7) ERROR 11-29 20:18:49 [multiproc_executor.py:953] ": vLLM's logger, and the name of its process.
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s?)?((ERROR|CRITICAL|WARNING) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"^(?P<name>[A-Za-z_][\w.]*?)(: (?P<message>.*))?$")
_BREAKDOWN = re.compile(r"^(Fatal Python error: .*|\s*what\(\):\s+.*|terminate called after throwing .*)$")
# What says only that something else has failed, and what ends when its process does.
_WRAPPERS = re.compile(
    r"See root cause above|See stack trace for root cause|EngineDeadError|Engine core proc \w+ died|"
    r"^(BrokenPipeError|EOFError|ConnectionResetError|KeyboardInterrupt|SystemExit)\b"
)
_MOST_BYTES = 4_000_000


@dataclass(frozen=True)
class RootCause:
    """An exception as a log has it.

    Attributes:
        name: Its class, without modules; empty where the process broke down without a Python exception.
        message: What it says, one line.
    """

    name: str
    message: str

    def exception(self) -> Exception:
        """An exception that reads the same: of a built-in class where it was one."""
        kind = getattr(builtins, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = type(self.name or "RuntimeError", (RuntimeError,), {})
        made: Exception = kind(self.message)
        return made


def root_cause(log: str) -> RootCause | None:
    """The last exception of a log that does not merely wrap another one.

    Of exceptions that were raised from one another, the last says most: it was written for a reader who does not know
    the first. Of processes, the last one to fail only reports what an earlier one said.
    """
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    found = [cause for index, line in enumerate(lines) if line == _TRACEBACK and (cause := _end_of(lines[index + 1 :]))]
    causes = [cause for cause in found if not _WRAPPERS.search(f"{cause.name}: {cause.message}")]
    if causes:
        return causes[-1]
    breakdowns = [line.strip() for line in lines if _BREAKDOWN.match(line)]
    return RootCause("", breakdowns[-1].removeprefix("what():").strip()) if breakdowns else None


def read_since(log: Path, offset: int) -> str:
    """What was written to a log after its first `offset` bytes, at most the last 4 MB of it."""
    try:
        with log.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(offset, size - _MOST_BYTES))
            return handle.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _end_of(lines: list[str]) -> RootCause | None:
    """The exception below the frames of a traceback."""
    for index, line in enumerate(lines):
        if line.startswith((" ", "\t")) or not line.strip():
            continue
        match = _EXCEPTION.match(line)
        if match is None:
            return None
        name, message = match["name"].rpartition(".")[2], (match["message"] or "").strip()
        if name == "ValidationError" and len(lines) > index + 1:
            # pydantic says how many fields are wrong, then the field, then what a validator of vLLM raised.
            details = [detail.strip() for detail in lines[index + 1 : index + 3]]
            message = next((d.removeprefix("Value error, ") for d in details if d.startswith("Value error, ")), message)
            message = re.sub(r" \[type=\w+, input_value=.*$", "", message)
        return RootCause(name, message)
    return None
