"""Jobs of the tests of attribution that a worker process runs, by the name of this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mismatch_probe.engines.attribute.trace import TraceRequest
from mismatch_probe.engines.base import RolloutJob


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

    def run(self, channel: Any) -> None:
        from safetensors.torch import load_file

        from mismatch_probe.engines.vllm import hooks
        from mismatch_probe.engines.vllm.engine import VllmRollout
        from validation.planted_faults import noise

        engine = VllmRollout(self.rollout)
        clean = load_file(Path(self.model_path) / "model.safetensors")
        for index, name in enumerate(self.weights):
            altered = {n: w + noise(w, self.size, index) if n == name else w for n, w in clean.items()}
            engine.load_weights(altered)
            request = replace(self.request, folder=str(Path(self.request.folder) / (name or "clean")))
            engine.on_model(partial(hooks.start_trace, request))
            engine.score(request.sequences)
            engine.on_model(hooks.finish_trace)
        engine.close()
