"""The usable tokens of a few whole sequences, and their sums by prompt.

Shape legend: `n` usable tokens, `s` sequences that have any, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.types import PairArrays

Ints = NDArray[np.int64]


def group_sums(group: Ints, values: NDArray[Any], n_groups: int) -> Floats:
    """`[n_groups]` float64 sums of `values` `[n]` by `group` `[n]`."""
    return np.bincount(group, weights=values, minlength=n_groups).astype(np.float64, copy=False)


@dataclass(frozen=True)
class SequenceRows:
    """The sequences of a chunk that have tokens.

    Attributes:
        sequence: `[s]` index in the pair, increasing.
        start: `[s]` the sequence's first row in the chunk.
        length: `[s]` tokens, unusable ones included.
        n_usable: `[s]` usable tokens.
    """

    sequence: Ints
    start: Ints
    length: Ints
    n_usable: Ints


def sequence_rows(pair: PairArrays, usable: NDArray[np.bool_]) -> SequenceRows:
    """The sequences of `pair`, of whose tokens `[N]` those count that `usable` `[N]` says."""
    start = np.flatnonzero(np.diff(pair.sequence, prepend=-1))
    length = np.diff(start, append=len(pair.sequence))
    whole = len(start) == 0 or bool(usable.all())
    n_usable = length if whole else np.add.reduceat(usable, start, dtype=np.int64)
    return SequenceRows(pair.sequence[start], start, length, n_usable)


def usable_rows(pair: PairArrays) -> NDArray[np.bool_]:
    """`[N]` whether a token counts: as the pair says, or else where it is finite on both sides."""
    if pair.usable is not None:
        return pair.usable
    return np.asarray(np.isfinite(pair.rollout_logprob) & np.isfinite(pair.trainer_logprob))


@dataclass(frozen=True)
class TokenChunk:
    """Usable tokens, those of a sequence next to each other.

    Attributes:
        rollout_logprob: `[n]` b, nats.
        trainer_logprob: `[n]` a, nats.
        position: `[n]`
        columns: Further properties, `[n]` each.
        start: `[s]` first token of each sequence.
        prompt: `[s]` prompt of each sequence.
        n_prompts: P of the pair.
    """

    rollout_logprob: Floats
    trainer_logprob: Floats
    position: Ints
    columns: Mapping[str, NDArray[Any]]
    start: Ints
    prompt: Ints
    n_prompts: int

    @classmethod
    def of(cls, pair: PairArrays, rows: SequenceRows, usable: NDArray[np.bool_], n_prompts: int) -> TokenChunk:
        keep = slice(None) if usable.all() else usable
        some = rows.n_usable > 0
        counts = rows.n_usable[some]
        return cls(
            rollout_logprob=np.asarray(pair.rollout_logprob[keep], dtype=np.float64),
            trainer_logprob=np.asarray(pair.trainer_logprob[keep], dtype=np.float64),
            position=pair.position[keep],
            columns={name: values[keep] for name, values in pair.columns.items()},
            start=np.cumsum(counts) - counts,
            prompt=pair.prompt[rows.sequence[some]],
            n_prompts=n_prompts,
        )

    def __len__(self) -> int:
        return len(self.rollout_logprob)

    def per_sequence(self, values: NDArray[Any]) -> Floats:
        """`[s]` sums of `values` `[n]`."""
        return np.add.reduceat(values, self.start, dtype=np.float64)

    def per_prompt(self, values: NDArray[Any]) -> Floats:
        """`[P]` sums of `values` `[n]`."""
        return group_sums(self.prompt, self.per_sequence(values), self.n_prompts)

    @cached_property
    def counts(self) -> Floats:
        """`[P]` tokens of each prompt."""
        lengths = np.diff(self.start, append=len(self))
        return group_sums(self.prompt, lengths, self.n_prompts)

    @cached_property
    def token_prompt(self) -> Ints:
        """`[n]` prompt of each token."""
        return np.repeat(self.prompt, np.diff(self.start, append=len(self)))

    @cached_property
    def log_ratio(self) -> Floats:
        """`[n]` d = a − b."""
        return self.trainer_logprob - self.rollout_logprob

    @cached_property
    def abs_log_ratio(self) -> Floats:
        return np.abs(self.log_ratio)

    @cached_property
    def squared_log_ratio(self) -> Floats:
        return self.log_ratio**2

    def ratio_excess(self, shift: float) -> Floats:
        """`[n]` (ρ − 1)·exp(−`shift`); kept where `shift` is 0, which it nearly always is."""
        return self._ratio_excess if shift == 0.0 else scales.shifted_expm1(self.log_ratio, shift)

    @cached_property
    def _ratio_excess(self) -> Floats:
        return scales.shifted_expm1(self.log_ratio, 0.0)

    @cached_property
    def rollout_prob(self) -> Floats:
        return np.exp(self.rollout_logprob)

    @cached_property
    def trainer_prob(self) -> Floats:
        return np.exp(self.trainer_logprob)

    @cached_property
    def prob_diff(self) -> Floats:
        """`[n]` e^a − e^b, from the larger side and expm1, so that it keeps its digits when a is close to b."""
        larger = np.maximum(self.trainer_prob, self.rollout_prob)
        return np.asarray(-np.sign(self.log_ratio) * larger * np.expm1(-self.abs_log_ratio))
