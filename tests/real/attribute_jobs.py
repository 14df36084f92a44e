"""Jobs of the tests of attribution that a worker process runs, by the name of this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mismatch_probe.engines.attribute.trace import TraceRequest
from mismatch_probe.engines.base import Channel, RolloutJob


@dataclass(frozen=True)
class TraceFaults:
    """Traces one vLLM engine after one weight of its checkpoint after another was altered, each in a folder `NAME`.

    Attributes:
        rollout: The engine, its core in the process.
        request: What to trace; its folder is the parent of all.
        weights: Which, by the checkpoint's names; the empty name alters none.
        size: Relative Frobenius norm of the noise.
    """

    rollout: RolloutJob
    request: TraceRequest
    weights: Sequence[str]
    size: float
    subject: str = "The traced engine"
    memory_advice: str = ""

    @property
    def model_path(self) -> str:
        return self.rollout.model_path

    @property
    def trust_remote_code(self) -> bool:
        return False

    def run(self, channel: Channel) -> None:
        from safetensors.torch import load_file

        from validation.planted_faults import noise

        engine = self.rollout.started()
        clean = load_file(Path(self.model_path) / "model.safetensors")
        for index, name in enumerate(self.weights):
            altered = {n: w + noise(w, self.size, index) if n == name else w for n, w in clean.items()}
            engine.load_weights(altered.items())
            request = replace(self.request, folder=str(Path(self.request.folder) / (name or "clean")))
            engine.trace(request)
        engine.close()
