"""The process that compares a trainer's inside with traces of engines, one dtype after another.

Nothing here imports torch before the job runs.

Shape legend: `M` differences, `S` sequences, `L` layers, `Q` rows whose logits were kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices, faults, registry
from mismatch_probe.engines.base import Channel, OnTrainer
from mismatch_probe.engines.events import Advance, Total
from mismatch_probe.runs.measurements import Measurement
from mismatch_probe.types import TrainerDtype, TrainerMode

if TYPE_CHECKING:
    from mismatch_probe.engines.attribute.inside import InsideComparison


@dataclass(frozen=True)
class Inside:
    """A trace, and the trainer that it is compared with.

    Attributes:
        name: Of the pass.
        file: Where it goes.
        dtype, mode: The trainer's.
        trace: The trace's folder.
    """

    name: str
    file: Measurement
    dtype: TrainerDtype
    mode: TrainerMode
    trace: str


@dataclass(frozen=True)
class InsideJob(OnTrainer):
    """Passes `NAME.npz`: `apart`, `engine`, `trainer`, `size` `[M, S]` (see `inside.Difference`), `lens` `[L, Q]`.

    Attributes:
        trainer: As it is trained, without requests.
        insides: What to compare.
    """

    insides: Sequence[Inside]
    subject: ClassVar[str] = "The comparison of layers"
    memory_advice: ClassVar[str] = "Leave the layers out with --no-layers, or use a machine with more memory."

    def run(self, channel: Channel) -> None:
        """Sends `Total` and `Advance` in dtypes; a phase for each."""
        from mismatch_probe.engines.attribute.trace import TraceFiles

        channel.send(Total(len(self.insides)))
        for inside in self.insides:
            if TraceFiles(inside.trace).whole:  # else its engine failed, which is told already
                inside.file.save(*self._compare(inside))
                TraceFiles(inside.trace).discard()
            channel.send(Advance(1))
            channel.phase(inside.name)

    def _compare(self, inside: Inside) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Facts and arrays of one dtype; one that fails leaves the others."""
        from mismatch_probe.engines.attribute.inside import InsideComparison

        device: Any = self.trainer.device
        flags = registry.find(self.trainer.engine).trainer_settings(device, inside.dtype).arguments
        facts: dict[str, Any] = {"made_with": devices.package_versions()}
        try:
            engine = replace(self.trainer, dtype=inside.dtype, mode=inside.mode, flags=flags).started()
            comparison = engine.run_on_model(lambda model: InsideComparison(engine, model, inside.trace))
            found, arrays = kept_of(comparison)
            return facts | found, arrays
        except Exception as error:
            return facts | {"failed": faults.told(error, self)}, {}


def kept_of(comparison: InsideComparison) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Facts and arrays of a comparison: which tensors, and the arrays of `InsideJob`."""
    lens, found = comparison.lens(), comparison.differences()
    facts = {
        "records": [{"kind": d.kind, "name": d.name, "layer": d.layer} for d in found],
        "layers": list(lens),
        "trained_layers": list(comparison.layers),
    }
    arrays = {n: np.stack([getattr(d, n) for d in found]) for n in ("apart", "engine", "trainer", "size")}
    return facts, {**arrays, "lens": np.stack(list(lens.values())) if lens else np.empty((0, 0))}
