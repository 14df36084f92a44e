"""A recorded training run, step by step: how the mismatch moves while the policy is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.chunks import usable_rows
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import MetricValue, PairArrays

STEP_KEYS = ("mean_abs_logprob_diff", "kl_k1", "kl_k3", "token_mult_prob_error", "mean_ratio", "ess_seq")
# A run of thousands of steps is shown by a selection: intervals of every single one would take minutes.
MOST_STEPS = 400
_REPLICATES = 200


@dataclass(frozen=True)
class StepResult:
    """A training step.

    Attributes:
        step: Its number in the file.
        n_tokens: Response tokens.
        metrics: The metrics of `STEP_KEYS`.
    """

    step: int
    n_tokens: int
    metrics: dict[str, MetricValue]


class StepSums:
    """Sums of a pair by training step; fed chunk by chunk.

    Args:
        step: `[S]` step of each sequence of the pair; None where there are no steps, and then nothing is kept.
    """

    def __init__(self, step: NDArray[np.int64] | None) -> None:
        self._step = step
        known = np.empty(0, np.int64) if step is None else np.unique(step)
        if len(known) > MOST_STEPS:
            known = known[np.linspace(0, len(known) - 1, MOST_STEPS).round().astype(np.int64)]
        self._kept = {int(value) for value in known}
        self._sums: dict[int, PairSums] = {}
        self._own: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def update(self, chunk: PairArrays) -> None:
        """Takes in a chunk of whole sequences."""
        if self._step is None:
            return
        of_token = self._step[chunk.sequence]
        for step in np.unique(of_token).tolist():
            if step not in self._kept:
                continue
            rows = of_token == step
            part = self._part(chunk, step, rows)
            self._sums.setdefault(step, PairSums(part)).update(part)

    def _part(self, chunk: PairArrays, step: int, rows: NDArray[np.bool_]) -> PairArrays:
        """A step's tokens of a chunk, its sequences and prompts counted from 0: sums are kept for its own alone."""
        if step not in self._own:
            sequences = np.flatnonzero(self._step == step)
            self._own[step] = sequences, np.unique(chunk.prompt[sequences], return_inverse=True)[1].astype(np.int64)
        sequences, prompt = self._own[step]
        names = ("rollout_logprob", "trainer_logprob", "position")
        tokens = {name: getattr(chunk, name)[rows] for name in names}
        sequence = np.searchsorted(sequences, chunk.sequence[rows])
        usable = usable_rows(chunk)[rows]
        return replace(chunk, **tokens, sequence=sequence, prompt=prompt, prompt_ids=(), columns={}, usable=usable)

    def results(self, *, seed: int = 0) -> list[StepResult]:
        """By step, in their order."""
        return [
            StepResult(step, sums.n_tokens, compute_metrics(sums, keys=STEP_KEYS, seed=seed, replicates=_REPLICATES))
            for step, sums in sorted(self._sums.items())
        ]
