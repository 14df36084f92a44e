"""The passes of a comparison: rows and columns of its matrix, and the reference beside it."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch_probe.config import CompareConfig
from mismatch_probe.passes import RECORDED_ROLLOUT, RECORDED_TRAINER, PassId
from mismatch_probe.results.manifest import Recorded


@dataclass(frozen=True)
class Passes:
    """The passes of a comparison.

    Attributes:
        rollouts: Rows of the matrix, in the order in which they run.
        trainers: Columns.
        reference: What the error budget charges errors against, None where there is none.
        source: The pass whose sequences every other pass takes; None where each rollout samples its own.
    """

    rollouts: tuple[PassId, ...]
    trainers: tuple[PassId, ...]
    reference: PassId | None
    source: PassId | None

    @property
    def scored(self) -> list[PassId]:
        """The passes that a trainer engine runs."""
        extra = [self.reference] if self.reference is not None and self.reference not in self.trainers else []
        return [trainer for trainer in (*self.trainers, *extra) if not trainer.recorded]


def passes_of(config: CompareConfig, recorded: Recorded | None = None) -> Passes:
    """The passes that a configuration asks for. Autocast applies to 16-bit types only: FP32 always has `cast`.

    Args:
        config: The configuration.
        recorded: Of a run `--from` a file: whose log-probs the file brings.
    """
    engine, trainer = config.rollout_engine, config.trainer_engine
    trainers = [
        PassId.trainer(trainer, dtype, mode)
        for dtype in config.trainer_dtypes
        for mode in (config.trainer_modes if dtype != "float32" else ("cast",))
    ]
    source = None
    if recorded is not None:
        source = RECORDED_ROLLOUT if recorded.rollout else RECORDED_TRAINER
        rollouts = [RECORDED_ROLLOUT] if recorded.rollout else []
        rollouts += (
            [PassId.rollout(engine, dtype, "replay") for dtype in config.rollout_dtypes] if config.replay else []
        )
        if recorded.trainer:
            trainers = [RECORDED_TRAINER, *(trainers if config.rescore else [])]
    elif config.sequences == "shared":
        first, *others = config.rollout_dtypes
        rollouts = [PassId.rollout(engine, first), *(PassId.rollout(engine, dtype, "replay") for dtype in others)]
        source = rollouts[0]
    else:
        rollouts = [PassId.rollout(engine, dtype) for dtype in config.rollout_dtypes]
    reference: PassId | None = PassId.trainer(trainer, config.reference)
    engines = any(not trainer.recorded for trainer in trainers)
    if not engines or (config.reference == "float32" and reference not in trainers):
        reference = None
    return Passes(tuple(rollouts), tuple(trainers), reference, source)
