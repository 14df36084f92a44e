"""One pass over the tokens of a pair: chunks go in, per-prompt sums come out, and everything is computed from those.

Chunks are `PairArrays` that hold whole sequences; a pair in memory is one chunk. What is kept grows with prompts and
sequences, but for one float64 per token: |d|, whose quantiles and tail need every value.

Shape legend: `N` tokens, `n` usable ones, `S` sequences that have tokens, `P` prompts, `K` bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics import scales
from mismatch_probe.metrics.accounting import Exclusions
from mismatch_probe.metrics.binned import POSITION_EDGES, PROBABILITY_EDGES, BinnedSums
from mismatch_probe.metrics.chunks import Ints, SequenceRows, TokenChunk, sequence_rows, usable_rows
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.metrics.largest import LargestTokens
from mismatch_probe.metrics.token_sums import DEFAULT_CLIP, Clip, TokenSums
from mismatch_probe.types import PairArrays

DENSITY_BINS = 50


@dataclass(frozen=True)
class SequenceTotals:
    """The sequences that have tokens.

    Attributes:
        prompt: `[S]` prompt of each.
        length: `[S]` T_i, tokens, unusable ones included.
        n_usable: `[S]` usable tokens.
        log_ratio: `[S]` sum of d over those, nats: D_i where all are usable.
    """

    prompt: Ints
    length: Ints
    n_usable: Ints
    log_ratio: Floats


class PairSums:
    """What the metrics and curves of a pair are computed from; `update` takes it in chunk by chunk.

    Args:
        pair: Prompts and policy of the pair, e.g. its first chunk; its tokens are not read.
        clip: Bounds of `frac_outside_clip` on the importance ratio.
        bins: Edges `[K+1]` for further columns of the pair, by name: `binned` then has their sums.

    Raises:
        UsageError: `clip` is not a pair 0 < low < high.

    Attributes:
        prompt: Prompt of each sequence of the pair, empty ones included; likewise `prompt_ids`, `on_policy` and
            `off_policy_why` are those of `PairArrays`.
        n_prompts: P, prompts without tokens included, so that prompts of two pairs can be matched.
        n_tokens: N.
        excluded: What is left out.
        tokens: Sums over the usable tokens.
        binned: Sums by `"probability"` (of the rollout), by `"position"` and by the columns of `bins`.
        density: `[50, 50]` tokens by rollout and trainer probability in equal bins.
        longest: Largest position of a usable token, plus 1.
        largest: The tokens that differ most.
        log_mult_error: log of the largest mean of exp|d| − 1 over a sequence without unusable tokens.
    """

    def __init__(
        self, pair: PairArrays, *, clip: Clip = DEFAULT_CLIP, bins: Mapping[str, Floats] | None = None
    ) -> None:
        if not 0 < clip[0] < clip[1]:
            raise UsageError(
                f"The clip range {clip[0]}, {clip[1]} is not a range of ratios.", "Give two bounds with 0 < low < high."
            )
        self.prompt, self.prompt_ids = pair.prompt, pair.prompt_ids
        self.on_policy, self.off_policy_why = pair.on_policy, pair.off_policy_why
        self.n_prompts = max(len(pair.prompt_ids), int(pair.prompt.max(initial=-1)) + 1)
        self.n_tokens = 0
        self.excluded = Exclusions()
        self.tokens = TokenSums(self.n_prompts, clip)
        self._bins = tuple(bins or ())
        edges = {"probability": PROBABILITY_EDGES, "position": POSITION_EDGES, **(bins or {})}
        self.binned = {name: BinnedSums(of, self.n_prompts) for name, of in edges.items()}
        self.density: Ints = np.zeros((DENSITY_BINS, DENSITY_BINS), dtype=np.int64)
        self.longest = 0
        self.largest = LargestTokens.none()
        self.log_mult_error = -math.inf
        self._last_sequence = -1
        self._sequences: list[SequenceTotals] = []
        self._abs_log_ratio = [np.empty(0)]

    def update(self, pair: PairArrays) -> None:
        """Takes in the tokens of a chunk.

        Raises:
            ValueError: The chunk does not hold whole sequences, or they do not come in the order of their indices.
        """
        if len(pair.sequence) == 0:
            return
        usable = usable_rows(pair)
        rows = sequence_rows(pair, usable)
        if rows.sequence[0] <= self._last_sequence or (np.diff(rows.sequence) < 0).any():
            raise ValueError("A chunk must hold whole sequences, and these must come in the order of their indices.")
        log_ratio = np.zeros(len(rows.sequence))
        if rows.n_usable.any():
            tokens = TokenChunk.of(pair, rows, usable, self.n_prompts)
            log_ratio[rows.n_usable > 0] = tokens.per_sequence(tokens.log_ratio)
            self.tokens.update(tokens)
            self._abs_log_ratio.append(tokens.abs_log_ratio)
            self._update_places(tokens)
            self._update_mult_error(tokens, rows)
            self.largest = self.largest.joined(LargestTokens.of(pair, usable, self.n_tokens))
        self.excluded.update(pair, usable)
        self._sequences.append(SequenceTotals(self.prompt[rows.sequence], rows.length, rows.n_usable, log_ratio))
        self._last_sequence = int(rows.sequence[-1])
        self.n_tokens += len(pair.sequence)

    def _update_places(self, tokens: TokenChunk) -> None:
        rollout, trainer = (np.minimum(side, 1.0) for side in (tokens.rollout_prob, tokens.trainer_prob))
        cells = [np.minimum((side * DENSITY_BINS).astype(np.int64), DENSITY_BINS - 1) for side in (rollout, trainer)]
        counts = np.bincount(cells[0] * DENSITY_BINS + cells[1], minlength=self.density.size)
        self.density += counts.reshape(self.density.shape)
        properties = {"probability": rollout, "position": tokens.position}
        properties |= {name: tokens.columns[name] for name in self._bins}
        for name, values in properties.items():
            self.binned[name].update(tokens, values)
        self.longest = max(self.longest, int(tokens.position.max()) + 1)

    def _update_mult_error(self, tokens: TokenChunk, rows: SequenceRows) -> None:
        some = rows.n_usable > 0
        whole = (rows.n_usable == rows.length)[some]
        size = tokens.abs_log_ratio
        if not whole.all():
            size = np.where(np.repeat(whole, rows.n_usable[some]), size, 0.0)
        shift = scales.shift_of(size)
        largest = float(
            (tokens.per_sequence(scales.shifted_expm1(size, shift)) / rows.n_usable[some])[whole].max(initial=0)
        )
        if largest > 0:
            self.log_mult_error = max(self.log_mult_error, shift + math.log(largest))

    @property
    def n_usable(self) -> int:
        """Usable tokens."""
        return sum(map(len, self._abs_log_ratio))

    @property
    def mean_abs_all_finite(self) -> float | None:
        """Mean |d| with the finite ones of the excluded tokens, nats; None where there are none of those."""
        extra = self.excluded.n_tokens - self.excluded.n_nonfinite
        if not extra:
            return None
        return (float(self.tokens.abs_log_ratio.sum()) + self.excluded.abs_log_ratio) / (self.n_usable + extra)

    @property
    def abs_log_ratio(self) -> Floats:
        """`[n]` |d| of the usable tokens, nats."""
        self._abs_log_ratio = [np.concatenate(self._abs_log_ratio)]
        return self._abs_log_ratio[0]

    @property
    def sequences(self) -> SequenceTotals:
        """The sequences that have tokens, in their order."""
        nothing = np.empty(0, dtype=np.int64)
        parts = [SequenceTotals(nothing, nothing, nothing, np.empty(0)), *self._sequences]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        self._sequences = [SequenceTotals(*map(np.concatenate, columns))]
        return self._sequences[0]


def accumulate(
    chunks: Iterable[PairArrays], *, clip: Clip = DEFAULT_CLIP, bins: Mapping[str, Floats] | None = None
) -> PairSums:
    """Sums over all chunks of a pair, at least one, in one pass; the options are those of `PairSums`."""
    sums: PairSums | None = None
    for chunk in chunks:
        if sums is None:
            sums = PairSums(chunk, clip=clip, bins=bins)
        sums.update(chunk)
    if sums is None:
        raise ValueError("a pair has at least one chunk, which may be empty")
    return sums


def as_sums(pair: PairArrays | PairSums) -> PairSums:
    """A pair in memory is a pair of one chunk."""
    return pair if isinstance(pair, PairSums) else accumulate([pair])
