"""Metrics of the parts of a pair: its training steps, or whatever else sorts sequences or tokens.

Shape legend: `N` tokens of a chunk, `S` sequences of the pair, `G` groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.chunks import Ints, usable_rows
from mismatch_probe.metrics.column import Scratch
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.types import MetricValue, PairArrays

GROUP_KEYS = (
    "mean_abs_logprob_diff",
    "kl_k1",
    "kl_k3",
    "token_mult_prob_error",
    "mean_ratio",
    "mean_inverse_ratio",
    "ess_seq",
)
# A run of thousands of steps is shown by a selection: intervals of every single one would take minutes.
MOST_GROUPS = 400
STEP = "step"
_REPLICATES = 200
_TOKEN_ARRAYS = ("rollout_logprob", "trainer_logprob", "position")


@dataclass(frozen=True)
class Grouping:
    """What tokens are sorted by.

    Attributes:
        key: Its name, e.g. `"step"`.
        codes: The group of each sequence `[S]`, or None where each token has its own in the pair's column `key` `[N]`.
            A code below 0 is in no group.
        labels: Names of the codes 0 … G−1; None where a code names itself.
    """

    key: str
    codes: Ints | None = None
    labels: tuple[str, ...] | None = None

    def of_tokens(self, chunk: PairArrays) -> Ints:
        """`[N]` group of each token."""
        if self.codes is not None:
            return self.codes[chunk.sequence]
        return np.asarray(chunk.columns[self.key], dtype=np.int64)

    def label(self, code: int) -> str:
        """What tables call a group."""
        return str(code) if self.labels is None else self.labels[code]


@dataclass(frozen=True)
class GroupResult:
    """A part of a pair.

    Attributes:
        key: What its tokens have in common, e.g. `"step"`.
        label: Which value of it, e.g. `"30"`.
        n_tokens: Response tokens.
        metrics: The metrics of `GROUP_KEYS`; a sequence that lies in several groups counts in each with its part.
    """

    key: str
    label: str
    n_tokens: int
    metrics: dict[str, MetricValue]


class GroupSums:
    """Sums of a pair by group; fed chunk by chunk. Without groupings nothing is kept. `scratch` is as of `PairSums`.

    At most `MOST_GROUPS` groups of a grouping are kept: evenly spaced ones of the codes of sequences, and of codes of
    tokens, which are only known at the end, those that come first.
    """

    def __init__(self, groupings: Sequence[Grouping], scratch: Scratch | None = None) -> None:
        self._parts = [_Parts(grouping, scratch) for grouping in groupings]

    def update(self, chunk: PairArrays) -> None:
        """Takes in a chunk of whole sequences."""
        for parts in self._parts:
            parts.update(chunk)

    def results(self, *, seed: int = 0) -> list[GroupResult]:
        """By grouping, then by code."""
        return [result for parts in self._parts for result in parts.results(seed)]


class _Parts:
    """The groups of one grouping."""

    def __init__(self, grouping: Grouping, scratch: Scratch | None) -> None:
        self._grouping, self._scratch = grouping, scratch
        self._kept: set[int] | None = None
        if grouping.codes is not None:
            known = np.unique(grouping.codes[grouping.codes >= 0])
            if len(known) > MOST_GROUPS:
                known = known[np.linspace(0, len(known) - 1, MOST_GROUPS).round().astype(np.int64)]
            self._kept = set(known.tolist())
        self._sums: dict[int, PairSums] = {}
        self._own: dict[int, tuple[Ints, Ints]] = {}

    def update(self, chunk: PairArrays) -> None:
        of_token = self._grouping.of_tokens(chunk)
        for code in np.unique(of_token).tolist():
            if code < 0 or not self._keeps(code):
                continue
            part = self._part(chunk, code, of_token == code)
            if code not in self._sums:
                self._sums[code] = PairSums(part, places=False, scratch=self._scratch)
            self._sums[code].update(part)

    def _keeps(self, code: int) -> bool:
        if self._kept is not None:
            return code in self._kept
        return code in self._sums or len(self._sums) < MOST_GROUPS

    def _part(self, chunk: PairArrays, code: int, rows: NDArray[np.bool_]) -> PairArrays:
        """A group's tokens of a chunk. Sums are kept for its own sequences and prompts alone, counted from 0, where
        these are known before; tokens of any sequence can be of a group of tokens.
        """
        tokens = {name: getattr(chunk, name)[rows] for name in _TOKEN_ARRAYS}
        part = replace(chunk, **tokens, sequence=chunk.sequence[rows], columns={}, usable=usable_rows(chunk)[rows])
        codes = self._grouping.codes
        if codes is None:
            return part
        if code not in self._own:
            sequences = np.flatnonzero(codes == code)
            prompt = np.unique(chunk.prompt[sequences], return_inverse=True)[1].astype(np.int64)
            self._own[code] = sequences, prompt
        sequences, prompt = self._own[code]
        return replace(part, sequence=np.searchsorted(sequences, part.sequence), prompt=prompt, prompt_ids=())

    def results(self, seed: int) -> list[GroupResult]:
        return [
            GroupResult(
                self._grouping.key,
                self._grouping.label(code),
                sums.n_tokens,
                compute_metrics(sums, keys=GROUP_KEYS, seed=seed, replicates=_REPLICATES),
            )
            for code, sums in sorted(self._sums.items())
        ]
