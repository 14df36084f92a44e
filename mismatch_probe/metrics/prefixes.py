"""Sums of d and of three functions of it over the first L tokens of every sequence, for a geometric grid of lengths;
and of d over all of its tokens, since a grid leaves the last ones out.

Shape legend: `N` tokens, `S` sequences, `G` lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import Ints, group_sums, usable_rows
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.types import PairArrays

# A factor of √2, up to 2²⁰ tokens; rounding leaves 1, 2, 3, 4, 6, 8, 11, 16, …
LENGTHS: Ints = np.unique(np.round(2.0 ** (np.arange(41) / 2)).astype(np.int64))


@dataclass(frozen=True)
class Prefixes:
    """Prefix sums of each sequence, NaN where it is shorter than the length, and its sum over all tokens.

    Attributes:
        length: `[G]` tokens, increasing.
        prompt: `[S]` prompt of each sequence.
        log_ratio: `[S, G]` D_i(L) = Σ_{t<L} d_t, nats.
        squares: `[S, G]` Σ d².
        k3: `[S, G]` Σ (expm1(d) − d), nats.
        chi2: `[S, G]` Σ expm1(d)².
        n_tokens: `[S]` tokens of each sequence.
        total: `[S]` D_i over all of them, nats.
        n_cut: Sequences that end early here, before their first unusable token.
    """

    length: Ints
    prompt: Ints
    log_ratio: Floats
    squares: Floats
    k3: Floats
    chi2: Floats
    n_tokens: Ints
    total: Floats
    n_cut: int

    def reached_by(self) -> Ints:
        """`[G]` distinct prompts with a sequence of at least each length."""
        reached = ~np.isnan(self.log_ratio)
        return np.array([len(np.unique(self.prompt[reached[:, g]])) for g in range(len(self.length))], dtype=np.int64)


class PrefixSums:
    """Collects `Prefixes` from chunks of whole sequences; keeps O(S·G) numbers and no tokens."""

    def __init__(self) -> None:
        self._prompt: list[Ints] = []
        self._sums: list[Floats] = []
        self._n_tokens: list[Ints] = []
        self._total: list[Floats] = []
        self._n_cut = 0

    def update(self, chunk: PairArrays) -> None:
        """Adds the sequences that have tokens in `chunk`, which holds all of their tokens, in order."""
        start = np.flatnonzero(np.diff(chunk.sequence, prepend=-1))
        if not len(start):
            return
        row = np.repeat(np.arange(len(start)), np.diff(start, append=len(chunk.sequence)))
        place = np.arange(len(row)) - start[row]
        d = chunk.trainer_logprob.astype(np.float64) - chunk.rollout_logprob.astype(np.float64)
        length = np.diff(start, append=len(row))
        bad = ~usable_rows(chunk)
        if bad.any():
            first = length.copy()
            np.minimum.at(first, row[bad], place[bad])
            self._n_cut += int((first < length).sum())
            keep = place < first[row]
            row, place, d, length = row[keep], place[keep], d[keep], first
        self._prompt.append(chunk.prompt[chunk.sequence[start]])
        self._sums.append(_prefix_sums(row, place, d, length))
        self._n_tokens.append(length)
        self._total.append(group_sums(row, d, len(length)))

    def result(self) -> Prefixes:
        """What has been collected so far, at every length that some sequence reaches."""
        width = max((block.shape[2] for block in self._sums), default=0)
        blocks = [
            np.pad(block, ((0, 0), (0, 0), (0, width - block.shape[2])), constant_values=np.nan) for block in self._sums
        ]
        sums = np.concatenate([np.empty((4, 0, width)), *blocks], axis=1)
        none = np.empty(0, dtype=np.int64)
        prompt, n_tokens = (np.concatenate([none, *parts]) for parts in (self._prompt, self._n_tokens))
        total = np.concatenate([np.empty(0), *self._total])
        log_ratio, squares, k3, chi2 = sums
        return Prefixes(LENGTHS[:width], prompt, log_ratio, squares, k3, chi2, n_tokens, total, self._n_cut)


def _prefix_sums(row: Ints, place: Ints, d: Floats, length: Ints) -> Floats:
    """`[4, S, G]` prefix sums of tokens at `place` `[N]` of sequence `row` `[N]`, each summed apart from the others."""
    width = int(np.searchsorted(LENGTHS, length.max(initial=0), side="right"))
    step = np.searchsorted(LENGTHS, place, side="right")
    cell = row * (width + 1) + step
    short = length[:, None] < LENGTHS[:width]
    sums = np.empty((4, len(length), width))
    with np.errstate(over="ignore"):
        for k, values in enumerate((d, d**2, scales.k3(d), np.expm1(d) ** 2)):
            steps = np.bincount(cell, weights=values, minlength=len(length) * (width + 1))
            sums[k] = np.cumsum(steps.reshape(len(length), width + 1), axis=1)[:, :width]
    sums[:, short] = np.nan
    return sums
