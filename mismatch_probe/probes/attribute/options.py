"""What an attribution is asked beside its comparison."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.types import DTYPES


@dataclass(frozen=True)
class AttributeOptions:
    """Settings of an attribution.

    Attributes:
        pair: `rollout/trainer` dtypes whose gap is taken apart; one dtype means both.
        settings: `default`, `all`, `none`, or names, see `settings.choose`.
        layers: Whether to look inside both models.
        layer_dtypes: In which dtypes.
        target: Largest fraction of the gap's RMS that classes of modules in FP32 may leave; None for four fifths of
            what a trainer wholly in FP32 closes.
    """

    pair: str = "bfloat16"
    settings: tuple[str, ...] = ("default",)
    layers: bool = True
    layer_dtypes: tuple[str, ...] = DTYPES
    target: float | None = None

    def __post_init__(self) -> None:
        self.dtypes  # noqa: B018  raises where it is malformed
        for dtype in self.layer_dtypes:
            if dtype not in DTYPES:
                raise UsageError(f"--layer-dtypes does not know {dtype!r}.", f"Known are {', '.join(DTYPES)}.")
        if self.target is not None and not (math.isfinite(self.target) and 0 < self.target < 1):
            raise UsageError("--target is a fraction of the gap, between 0 and 1.", "Write for example --target 0.9.")

    @property
    def dtypes(self) -> tuple[str, str]:
        """Rollout and trainer dtype.

        Raises:
            UsageError: `pair` names something else.
        """
        names = tuple(SHORT_DTYPES.get(name, name) for name in self.pair.split("/"))
        if len(names) not in (1, 2) or any(name not in DTYPES for name in names):
            raise UsageError(f"--pair {self.pair!r} is not rollout/trainer.", "Write for example --pair bf16/bf16.")
        return names[0], names[-1]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
