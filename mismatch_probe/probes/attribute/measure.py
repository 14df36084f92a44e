"""The engine part of an attribution: which readings a run still lacks, and the making of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.arrays import load_arrays, save_arrays
from mismatch_probe.engines.attribute.rollout import ROUTES
from mismatch_probe.engines.attribute.trace import TraceFiles
from mismatch_probe.engines.attribute.trainer import FIXES, set_name, single_name
from mismatch_probe.engines.attribute.variants import FP32_CLASSES
from mismatch_probe.engines.refusals import refusal
from mismatch_probe.errors import DiskFull, EngineMissing, Interrupted, ProbeError
from mismatch_probe.probes.attribute.baseline import Baseline
from mismatch_probe.probes.attribute.knobs import Knob, choose, knobs_of
from mismatch_probe.probes.attribute.names import (
    AT_ROLLOUT,
    CAST,
    FOLDER,
    FOLLOWED,
    PREFILL,
    REPLAY,
    SAME_DTYPE,
    TRAINER,
    WIDE_PREFILL,
    inside_name,
)
from mismatch_probe.probes.attribute.options import AttributeOptions
from mismatch_probe.probes.attribute.steps import Step, Steps
from mismatch_probe.probes.own_pass import model_of
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.workers import Workers, drive
from mismatch_probe.types import DTYPES

# Of what is compared inside; another number makes all of it anew.
INSIDES = 2
Part = tuple[dict[str, Any], dict[str, NDArray[Any]]]


class Readings:
    """The readings of an attribution in a run's folder.

    Args:
        base: What is taken apart.
        options: The attribution's.
    """

    def __init__(self, base: Baseline, options: AttributeOptions) -> None:
        self._base, self._options = base, options
        self.knobs = knobs_of(base.context)
        chosen = choose(self.knobs, options.knobs)
        if options.layers and not base.eager:
            # Layers are seen in eager mode only, so how far that is from the baseline is always told.
            chosen += [knob for knob in self.knobs if knob.name == "rollout-eager" and knob not in chosen]
        self.chosen = tuple(chosen)
        self.wanted = tuple(knob for knob in chosen if not knob.why_missing(base.context))

    def key(self, name: str) -> str:
        """A digest of all that a reading depends on."""
        base = self._base
        knob = next((knob for knob in self.knobs if knob.name == name), None)
        if knob is not None:
            return base.key(name, knob.arguments, knob.take, knob.variant, knob.dtype, knob.environment)
        if name == FIXES:
            return base.key(name, self._options.target)
        if name in map(inside_name, DTYPES):
            return base.key(name, INSIDES)
        return base.key(name)

    @property
    def folder(self) -> Path:
        """Where readings lie."""
        return self._base.run.path / FOLDER / "readings"

    def file(self, name: str) -> Path:
        """Where a reading lies."""
        return self.folder / f"{name}.npz"

    def load(self) -> dict[str, Part]:
        """The readings that are there and were made of this run, also those that nobody asks for now."""
        names = dict.fromkeys([*self._names(self.knobs), FIXES])
        found = {name: load_arrays(self.file(name), self.key(name)) for name in names}
        parts = {name: part for name, part in found.items() if part is not None}
        for index, _ in enumerate(parts[FIXES][0].get("sets", ()) if FIXES in parts else ()):
            part = load_arrays(self.file(set_name(index)), self.key(FIXES))
            if part is not None:
                parts[set_name(index)] = part
        return parts

    def make_missing(self, progress: Progress, resume: str, *, again: bool) -> None:
        """Makes the readings that are not there yet.

        Args:
            progress: Told about it.
            resume: The command that goes on after an interruption.
            again: Whether what failed gets another try.

        Raises:
            Interrupted: The user stopped it; finished readings stay.
            ProbeError: No other engine could run either.
        """
        there = self.load()
        for name in [name for name, (facts, _) in there.items() if again and "failed" in facts]:
            self.file(name).unlink()
            del there[name]
        if FIXES in there and not set(self.fix_classes) <= set(there[FIXES][0].get("classes", self.fix_classes)):
            del there[FIXES]  # it was looked for among fewer classes
        missing = [name for name in self._names(self.wanted) if name not in there]
        if not missing:
            return
        steps = Steps(self, self._base, self._options, model_of(self._base.run, self._base.config, progress)).of(
            missing
        )
        try:
            with Workers(self._base.run.path / "logs") as workers:
                for index, step in enumerate(steps):
                    process = workers.take(step.kind, step.environment)
                    if index + 1 < len(steps):
                        workers.prepare(steps[index + 1].kind, steps[index + 1].environment)
                    try:
                        drive(process, step.name, step.job, progress)
                    except (DiskFull, EngineMissing):
                        raise
                    except ProbeError as error:
                        progress.end(step.name, error.what)
                        self._fail(step, error)
        except KeyboardInterrupt:
            raise Interrupted("Stopped; what is finished is kept.", f"Continue with: {resume}") from None
        finally:  # they hold the user's data, and whoever goes on makes them again
            for folder in (self._base.run.path / FOLDER).glob("trace-*"):
                TraceFiles(folder).discard()

    def _fail(self, step: Step, error: ProbeError) -> None:
        """Keeps why readings could not be made; those that the process had finished stay."""
        lost = [*step.readings, *(inside_name(dtype) for dtype in step.traces)]
        for name in (name for name in lost if load_arrays(self.file(name), self.key(name)) is None):
            empty: dict[str, NDArray[Any]] = {"logprobs": np.empty(0, np.float32), "index": np.empty(0, np.int64)}
            save_arrays(self.file(name), self.key(name), {"failed": error.what}, empty)

    # What there is to read.

    def _names(self, knobs: Sequence[Knob]) -> list[str]:
        names = [REPLAY, PREFILL, TRAINER, AT_ROLLOUT]
        names += [CAST] if self._base.context.trainer_mode == "autocast" else []
        names += [SAME_DTYPE] if self._base.context.mixed else []
        names += [knob.name for knob in knobs]
        names += [FIXES] if self.fix_classes else []
        names += [ROUTES, FOLLOWED] if self._base.context.experts and not self._base.context.why_no_routes else []
        names += [WIDE_PREFILL] if self.wide == WIDE_PREFILL else []
        return names + [inside_name(dtype) for dtype in self.layer_dtypes]

    @property
    def wide(self) -> str:
        """The reading of the engine in FP32, by prefill, which runs for its layers where it is not the baseline; empty
        where there is none.
        """
        if self._base.context.rollout_dtype == "float32":
            return PREFILL
        return WIDE_PREFILL if "float32" in self.layer_dtypes else ""

    @property
    def why_no_layers(self) -> str:
        """Why no layer can be compared; empty where they can."""
        if not self._options.layers:
            return "left out: --no-layers"
        if not self._base.context.layers:
            return "the checkpoint's config.json does not say how many layers it has"
        ranks = self._base.engine.get("tensor_parallel_size", 1)
        return f"a model that is split over {ranks} GPUs has no whole tensors to look at" if ranks > 1 else ""

    @property
    def layer_dtypes(self) -> tuple[str, ...]:
        """Dtypes whose layers are compared: those that the engine takes."""
        if self.why_no_layers:
            return ()
        return tuple(d for d in self._options.layer_dtypes if not refusal(self._base.context.model, d))

    @property
    def fix_classes(self) -> tuple[str, ...]:
        """Classes of modules that are read in FP32."""
        names = {knob.name for knob in self.wanted}
        return tuple(name for name in FP32_CLASSES if single_name(name) in names)
