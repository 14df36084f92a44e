"""Are memory and disk enough? Weights alone are counted, so what is reported is so."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mismatch_probe.engines.environment import memory_bytes
from mismatch_probe.probes.preflight import Subject, check, found
from mismatch_probe.results.finding import Finding, Severity


@check("memory", needs=("weights", "run"))
def memory_fits(subject: Subject) -> Iterator[Finding]:
    """The weights of the largest pass against the machine's memory, or its largest GPU's."""
    assert subject.use.device is not None
    needed = int(subject.checkpoint.parameters * subject.use.bytes_per_weight)
    memory = memory_bytes(subject.use.device)
    if memory is None or needed <= memory[1]:
        return
    total, free = memory
    # Several GPUs can share a model, and what is in use now can be freed.
    severe = needed > total and subject.use.device == "cpu"
    severity: Severity = "fail" if severe else "warn"
    yield found("memory-short", severity, subject.use.device, needed=needed, total=total, free=free)


@check("disk", needs=("run",))
def disk_fits(subject: Subject) -> Iterator[Finding]:
    """What the run still has to write against what is free where it writes."""
    folder = subject.use.folder
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    needed, free = subject.use.disk_bytes - _bytes_below(folder), shutil.disk_usage(there).free
    if needed > free:
        yield found("disk-short", "fail", str(there), needed=needed, free=free)


def _bytes_below(folder: Path) -> int:
    """The size of a folder's files. Other programs can write there: what vanishes meanwhile counts as 0 bytes."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
