"""What an audit is asked beside its comparison."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mismatch_probe.config import check_lengths, flag
from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.length_prediction import FURTHEST
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import DTYPES

# The paper's step: 64 prompts × 8 samples in 4 minibatches.
STEP_SEQUENCES = 128


@dataclass(frozen=True)
class AuditOptions:
    """Settings of an audit.

    Attributes:
        profile: A shipped profile's name, or a TOML file.
        planned_tokens: Response length that the RL run will have; 8 times the comparison's longest for None, as far as
            growth is predicted.
        step_tokens: Response tokens that a training step's loss is averaged over, which scales every gradient; 128
            responses of the planned length for None, as in the paper.
        learning_rates: At which the engine's lag is computed.
        pairs: `rollout/trainer` that decide the exit code; the recommended pair where there are none.
        strict: Whether a warning counts as a failure.
    """

    profile: str = "default"
    planned_tokens: int | None = None
    step_tokens: int | None = None
    learning_rates: tuple[float, ...] = (1e-6, 1e-5)
    pairs: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("planned_tokens", "step_tokens"):
            if getattr(self, name) is not None:
                check_lengths((getattr(self, name),), flag(name))
        if not self.learning_rates or not all(math.isfinite(r) and r > 0 for r in self.learning_rates):
            raise UsageError("--learning-rate must be above 0.", "Leave it out for 1e-6 and 1e-5.")
        for pair in self.pairs:
            self.dtypes_of(pair)

    def planned(self, run: RunDirectory) -> int:
        """The planned response length, tokens."""
        return self.planned_tokens or FURTHEST * run.manifest.sizes.max_tokens

    def loss_tokens(self, run: RunDirectory) -> int:
        """Response tokens that a step's loss is averaged over."""
        return self.step_tokens or STEP_SEQUENCES * self.planned(run)

    @property
    def wanted_pairs(self) -> tuple[tuple[str, str], ...]:
        """The dtypes of `pairs`."""
        return tuple(self.dtypes_of(pair) for pair in self.pairs)

    @staticmethod
    def dtypes_of(pair: str) -> tuple[str, str]:
        """Rollout and trainer dtype of `rollout/trainer`; one dtype means both.

        Raises:
            UsageError: It names something else.
        """
        names = tuple(SHORT_DTYPES.get(name, name) for name in pair.split("/"))
        if len(names) not in (1, 2) or any(name not in DTYPES for name in names):
            raise UsageError(f"--pair {pair!r} is not rollout/trainer.", "Write for example --pair bf16/bf16.")
        return names[0], names[-1]

    def flags(self) -> str:
        """What of this a run does not remember, as it stands on the command line."""
        return "".join(f" --pair {pair}" for pair in self.pairs) + (" --strict" if self.strict else "")

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
