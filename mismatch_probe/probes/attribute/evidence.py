"""What an attribution has to go by: the pair, what was asked for, and the passes that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import ladder
from mismatch_probe.probes.attribute.pair import Pair
from mismatch_probe.probes.attribute.store import PassStore
from mismatch_probe.runs.measurements import Part

NOT_MEASURED = "not measured yet; `attribute --resume` runs it"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """Passes of a pair.

    Attributes:
        pair: The pair.
        store: What was asked for.
        parts: What is there, by name.
    """

    pair: Pair
    store: PassStore
    parts: Mapping[str, Part]

    @property
    def seed(self) -> int:
        """Of every bootstrap."""
        return self.pair.config.seed

    @property
    def gap(self) -> Floats:
        """`[N]` d, nats."""
        return self.pair.trainer_logprobs - self.pair.rollout_logprobs

    def measured(self, name: str) -> bool:
        """Whether a pass is there and holds log-probs."""
        return name in self.parts and "seconds" in self.parts[name][0] and "failed" not in self.parts[name][0]

    def logprobs(self, name: str) -> Floats | None:
        """`[N]` of a pass over all sequences, nats; None where there is none."""
        part = self.parts.get(name)
        if part is None or len(part[1].get("logprobs", ())) != len(self.pair.rollout_logprobs):
            return None
        return np.asarray(part[1]["logprobs"], np.float64)

    def status(self, name: str) -> Literal["unsupported", "failed", "skipped"]:
        """What became of a pass that holds no log-probs."""
        if name not in self.parts:
            return "skipped"
        return "unsupported" if "unsupported" in self.parts[name][0] else "failed"

    def why(self, name: str) -> str:
        """Why a pass cannot be used."""
        part = self.parts.get(name)
        if part is None:
            return NOT_MEASURED
        return str(part[0].get("failed") or part[0].get("unsupported") or "it covers other tokens")

    def size(self, d: Floats) -> ladder.Gap:
        """How large a gap `[N]` is."""
        return ladder.gap(d, self.pair.tokens, seed=self.seed)

    def change(self, before: Floats, after: Floats) -> ladder.Change:
        """What turns one gap `[N]` into another does."""
        return ladder.change(before, after, self.pair.tokens, seed=self.seed)
