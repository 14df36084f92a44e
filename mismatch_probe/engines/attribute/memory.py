"""Peak memory of a stretch of a process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any


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
