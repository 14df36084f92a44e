"""The engine part of an attribution: runs the processes that make what is missing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.config import AttributeOptions
from mismatch_probe.engines.attribute.trace import TraceFiles
from mismatch_probe.errors import DiskFull, EngineMissing, ProbeError
from mismatch_probe.probes.attribute.names import FOLDER, inside_name
from mismatch_probe.probes.attribute.pair import Pair
from mismatch_probe.probes.attribute.processes import Process, Processes
from mismatch_probe.probes.attribute.store import PassStore
from mismatch_probe.probes.own_pass import model_of
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.workers import Workers, drive


def make_missing(store: PassStore, pair: Pair, options: AttributeOptions, progress: Progress, *, again: bool) -> None:
    """Makes the passes that are not there yet.

    Args:
        store: Where they are.
        pair: What is taken apart.
        options: The attribution's.
        progress: Told about it.
        again: Whether what failed gets another try.

    Raises:
        ProbeError: No other engine could run either.
    """
    missing = store.missing(again=again)
    if not missing:
        return
    processes = Processes(store, pair, options, model_of(pair.run, pair.config, progress)).of(missing)
    try:
        with Workers(pair.run.path / "logs") as workers:
            for index, process in enumerate(processes):
                worker = workers.take(process.kind, process.environment)
                if index + 1 < len(processes):
                    workers.prepare(processes[index + 1].kind, processes[index + 1].environment)
                try:
                    drive(worker, process.name, process.job, progress)
                except (DiskFull, EngineMissing):
                    raise
                except ProbeError as error:
                    progress.end(process.name, error.what)
                    _fail(store, process, error)
    finally:  # they hold the user's data, and whoever goes on makes them again
        for folder in (pair.run.path / FOLDER).glob("trace-*"):
            TraceFiles(folder).discard()


def _fail(store: PassStore, process: Process, error: ProbeError) -> None:
    """Keeps why passes could not be made; those that the process had finished stay."""
    lost = [*process.passes, *(inside_name(dtype) for dtype in process.traces)]
    for name in (name for name in lost if not store.files.has(name)):
        empty: dict[str, NDArray[np.generic]] = {"logprobs": np.empty(0, np.float32), "index": np.empty(0, np.int64)}
        store.files.at(name).save({"failed": error.what}, empty)
