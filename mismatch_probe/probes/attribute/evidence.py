"""What an attribution has to go by: the pair, what was asked for, and the readings that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.probes.attribute.baseline import Baseline
from mismatch_probe.probes.attribute.measure import Part, Readings
from mismatch_probe.types import MetricValue

NOT_MEASURED = "not measured: `mismatch-probe attribute --resume RUN` does it, with the engines"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """Readings of a pair.

    Attributes:
        base: The pair.
        readings: What was asked for.
        parts: What is there, by name.
    """

    base: Baseline
    readings: Readings
    parts: Mapping[str, Part]

    @property
    def seed(self) -> int:
        """Of every bootstrap."""
        return self.base.config.seed

    @property
    def gap(self) -> Floats:
        """`[N]` d, nats."""
        return self.base.trainer_logprobs - self.base.rollout_logprobs

    def measured(self, name: str) -> bool:
        """Whether a reading is there and holds log-probs."""
        return name in self.parts and "seconds" in self.parts[name][0] and "failed" not in self.parts[name][0]

    def reading(self, name: str) -> Floats | None:
        """`[N]` of a reading over all sequences; None where there is none."""
        part = self.parts.get(name)
        if part is None or len(part[1].get("logprobs", ())) != len(self.base.rollout_logprobs):
            return None
        return np.asarray(part[1]["logprobs"], np.float64)

    def why(self, name: str) -> str:
        """Why a reading cannot be used."""
        part = self.parts.get(name)
        if part is None:
            return NOT_MEASURED
        return str(part[0].get("failed") or part[0].get("unavailable") or "it covers other tokens")


def values(found: Mapping[str, MetricValue]) -> dict[str, Any]:
    """As JSON has them."""
    return {name: value.as_dict() for name, value in found.items()}


def finite(value: float) -> float:
    """JSON has no infinity."""
    return float(min(value, 1e30))


def number(value: float) -> float | None:
    """JSON has no NaN, either: then there is none."""
    return float(value) if np.isfinite(value) else None
