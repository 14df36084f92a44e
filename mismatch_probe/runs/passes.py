"""The passes of a comparison: rows and columns of its matrix, and the reference beside it."""

from __future__ import annotations

from dataclasses import dataclass

from mismatch_probe.config import CompareConfig
from mismatch_probe.passes import (
    RECORDED_CURRENT,
    RECORDED_PREFILL,
    RECORDED_REF,
    RECORDED_ROLLOUT,
    RECORDED_TRAINER,
    PassId,
)
from mismatch_probe.results.dump import Recorded

RECORDED_KEYS: dict[PassId, str] = {
    RECORDED_ROLLOUT: "rollout_logprobs",
    RECORDED_TRAINER: "trainer_logprobs",
    RECORDED_PREFILL: "rollout_prefill_logprobs",
    RECORDED_CURRENT: "trainer_logprobs_2",
    RECORDED_REF: "ref_logprobs",
}
"""The passes that a dump can bring, by the key of the generic format that holds their log-probs."""
# What tells more beside rollout and trainer: the engine against its own prefill, that against the trainer, the trainer
# before against in its update, and the rollout against the reference model.
_BESIDE = (
    (RECORDED_ROLLOUT, RECORDED_PREFILL),
    (RECORDED_PREFILL, RECORDED_TRAINER),
    (RECORDED_TRAINER, RECORDED_CURRENT),
    (RECORDED_ROLLOUT, RECORDED_REF),
)


@dataclass(frozen=True)
class Passes:
    """The passes of a comparison.

    Attributes:
        rollouts: Rows of the matrix, in the order in which they run.
        trainers: Columns.
        reference: What the error budget charges errors against, None where there is none.
        source: The pass whose sequences every other pass takes; None where each rollout samples its own.
        beside: Pairs of what else a dump brought, outside the matrix.
    """

    rollouts: tuple[PassId, ...]
    trainers: tuple[PassId, ...]
    reference: PassId | None
    source: PassId | None
    beside: tuple[tuple[PassId, PassId], ...] = ()

    @property
    def scored(self) -> list[PassId]:
        """The passes that a trainer engine runs."""
        extra = [self.reference] if self.reference is not None and self.reference not in self.trainers else []
        return [trainer for trainer in (*self.trainers, *extra) if not trainer.recorded]


def passes_of(config: CompareConfig, recorded: Recorded | None = None) -> Passes:
    """The passes that a configuration asks for. Autocast applies to 16-bit types only: FP32 always has `cast`.

    Args:
        config: The configuration.
        recorded: Of a run `--from` a dump: whose log-probs the dump brings.
    """
    engine, trainer = config.rollout_engine, config.trainer_engine
    trainers = [
        PassId.trainer(trainer, dtype, mode)
        for dtype in config.trainer_dtypes
        for mode in (config.trainer_modes if dtype != "float32" else ("cast",))
    ]
    source: PassId | None = None
    beside: tuple[tuple[PassId, PassId], ...] = ()
    if recorded is not None:
        there = [one for one, key in RECORDED_KEYS.items() if key in recorded.file.keys]
        beside = tuple(pair for pair in _BESIDE if set(pair) <= set(there))
        # Of ids alone this pass has no log-probs, and is no row of the matrix.
        source = RECORDED_TRAINER if recorded.trainer and not recorded.rollout else RECORDED_ROLLOUT
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
    return Passes(tuple(rollouts), tuple(trainers), reference, source, beside)
