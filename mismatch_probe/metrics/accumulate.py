"""One pass over the tokens of a pair: chunks go in, per-prompt sums come out, and everything is computed from those.

Chunks are `PairArrays` that hold whole sequences; a pair in memory is one chunk. What is kept grows with prompts and
sequences, but for one float64 per token: d, whose quantiles and tails need every value. It is a `Column`, which can lie
on the disk.

Shape legend: `N` tokens, `n` usable ones, `S` sequences that have tokens, `P` prompts, `K` bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import Exclusions, Ints, SequenceRows, TokenChunk, sequence_rows, usable_rows
from mismatch_probe.metrics.column import Column, Scratch
from mismatch_probe.metrics.fits import FitSums, sequence_slopes
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.metrics.sums import POSITION_EDGES, PROBABILITY_EDGES, BinnedSums, CentredSums, Range, ShiftedSums
from mismatch_probe.types import PairArrays

LARGEST_TOKENS = 5
Clip = tuple[float, float]
DEFAULT_CLIP: Clip = (0.8, 1.28)
# A confident disagreement: the rollout gave the token about even odds or better, the trainer e² times less.
CONFIDENT_ROLLOUT_LOGPROB = -0.7
CONFIDENT_LOG_RATIO = -2.0
DENSITY_BINS = 50


@dataclass(frozen=True)
class LargestTokens:
    """The usable tokens with the largest |d|, largest first, of equal ones the earliest.

    Attributes:
        row: Index of each among the pair's tokens.
        sequence: Index of its sequence.
        position: Index in its response.
        rollout_logprob: b, nats.
        trainer_logprob: a, nats.
    """

    row: Ints
    sequence: Ints
    position: Ints
    rollout_logprob: Floats
    trainer_logprob: Floats

    @classmethod
    def of(cls, pair: PairArrays, usable: NDArray[np.bool_], first_row: int) -> LargestTokens:
        """Those of a chunk whose first token is the pair's token `first_row`.

        Args:
            pair: The chunk.
            usable: `[N]` which of its tokens count; at least one does.
            first_row: How many tokens the pair has before it.
        """
        with np.errstate(invalid="ignore"):
            size = np.where(usable, np.abs(pair.trainer_logprob - pair.rollout_logprob), -1.0)
        place = len(size) - min(LARGEST_TOKENS, int(np.count_nonzero(usable)))
        rows = np.flatnonzero(size >= np.partition(size, place)[place])
        rows = rows[np.argsort(-size[rows], kind="stable")][:LARGEST_TOKENS]
        return cls(
            row=rows + first_row,
            sequence=pair.sequence[rows],
            position=pair.position[rows],
            rollout_logprob=pair.rollout_logprob[rows],
            trainer_logprob=pair.trainer_logprob[rows],
        )

    def joined(self, later: LargestTokens) -> LargestTokens:
        """Those of both, of which `later` come after these in the pair."""
        columns = [np.concatenate(both) for both in zip(vars(self).values(), vars(later).values(), strict=True)]
        every = LargestTokens(*columns)
        order = np.argsort(-np.abs(every.trainer_logprob - every.rollout_logprob), kind="stable")[:LARGEST_TOKENS]
        return LargestTokens(*(column[order] for column in columns))

    @classmethod
    def none(cls) -> LargestTokens:
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing, nothing, np.empty(0), np.empty(0))


class TokenSums:
    """Per-prompt sums `[P]` over the usable tokens, and what else token metrics need.

    Attributes:
        counts: Tokens.
        log_ratio: Σ d.
        abs_log_ratio: Σ |d|.
        squared_log_ratio: Σ d².
        abs_prob_diff: Σ |e^a − e^b|.
        js_k3: Σ of the Jensen–Shannon estimator.
        outside_clip: Tokens whose ρ lies outside the clip range.
        confident: Confident disagreements.
        ratio: Σ k3(d) and Σ (ρ − 1).
        ratio_excess: ρ − 1 about its mean, times exp(−shift) of `ratio`.
        squared_ratio: Σ (ρ² − 1).
        abs_ratio: Σ (exp|d| − 1).
        prob_gap: |e^a − e^b| about its mean.
        probs: e^a and e^b about their means.
        prob_contrasts: e^a − e^b and e^a + e^b about their means.
        ranges: Of `"abs_log_ratio"`, `"rollout_logprob"` and `"trainer_logprob"`.
        fits: Of both log-probs and entropies.
    """

    def __init__(self, n_prompts: int, clip: Clip) -> None:
        self.fits = FitSums(n_prompts)
        self.counts, self.log_ratio, self.abs_log_ratio, self.squared_log_ratio = np.zeros((4, n_prompts))
        self.abs_prob_diff, self.js_k3, self.outside_clip, self.confident = np.zeros((4, n_prompts))
        self.ratio = ShiftedSums(n_prompts, 2)
        self.squared_ratio, self.abs_ratio = ShiftedSums(n_prompts, 1), ShiftedSums(n_prompts, 1)
        self.ratio_excess, self.prob_gap = CentredSums(n_prompts, 1), CentredSums(n_prompts, 1)
        self.probs, self.prob_contrasts = CentredSums(n_prompts, 2), CentredSums(n_prompts, 2)
        self.ranges = {name: Range() for name in ("abs_log_ratio", "rollout_logprob", "trainer_logprob")}
        self._log_clip = (math.log(clip[0]), math.log(clip[1]))

    def update(self, tokens: TokenChunk) -> None:
        """Takes in at least one token."""
        d, size = tokens.log_ratio, tokens.abs_log_ratio
        self.counts += tokens.counts
        self.log_ratio += tokens.per_prompt(d)
        self.abs_log_ratio += tokens.per_prompt(size)
        self.squared_log_ratio += tokens.per_prompt(tokens.squared_log_ratio)
        self.js_k3 += tokens.per_prompt(scales.js_k3(size))
        self.outside_clip += tokens.per_prompt((d < self._log_clip[0]) | (d > self._log_clip[1]))
        confident = (tokens.rollout_logprob > CONFIDENT_ROLLOUT_LOGPROB) & (d < CONFIDENT_LOG_RATIO)
        self.confident += tokens.per_prompt(confident)
        self._update_ratios(tokens)
        # A broken engine's log-probs can be so far above 0 that these overflow; the metrics then say so.
        with np.errstate(over="ignore", invalid="ignore"):
            self._update_probabilities(tokens)
        self.fits.update(tokens)
        for name, seen in self.ranges.items():
            seen.update(getattr(tokens, name))

    def _update_ratios(self, tokens: TokenChunk) -> None:
        d, size = tokens.log_ratio, tokens.abs_log_ratio
        before, shift = self.ratio.shift, max(self.ratio.shift, scales.shift_of(d))
        excess = tokens.ratio_excess(shift)
        self.ratio.update([tokens.per_prompt(tokens.k3(shift)), tokens.per_prompt(excess)], shift)
        self.ratio_excess.scale(math.exp(before - shift))
        self.ratio_excess.update([excess], tokens.counts, tokens.per_prompt)
        for sums, x in ((self.squared_ratio, 2 * d), (self.abs_ratio, size)):
            shift = scales.shift_of(x)
            sums.update([tokens.per_prompt(scales.shifted_expm1(x, shift))], shift)

    def _update_probabilities(self, tokens: TokenChunk) -> None:
        gap = np.abs(tokens.prob_diff)
        self.abs_prob_diff += tokens.per_prompt(gap)
        self.prob_gap.update([gap], tokens.counts, tokens.per_prompt)
        sides = [tokens.trainer_prob, tokens.rollout_prob]
        self.probs.update(sides, tokens.counts, tokens.per_prompt)
        self.prob_contrasts.update([tokens.prob_diff, sides[0] + sides[1]], tokens.counts, tokens.per_prompt)


@dataclass(frozen=True)
class SequenceTotals:
    """The sequences that have tokens.

    Attributes:
        index: `[S]` which sequence of the pair, increasing.
        prompt: `[S]` prompt of each.
        length: `[S]` T_i, tokens, unusable ones included.
        n_usable: `[S]` usable tokens.
        log_ratio: `[S]` sum of d over those, nats: D_i where all are usable.
        k3: `[S]` sum of k3 over those, nats.
        max_k3: `[S]` largest k3 of those, nats.
        slope: `[S]` of a on b over those, see `metrics.fits`.
    """

    index: Ints
    prompt: Ints
    length: Ints
    n_usable: Ints
    log_ratio: Floats
    k3: Floats
    max_k3: Floats
    slope: Floats

    @classmethod
    def of(cls, pair: PairArrays, rows: SequenceRows, tokens: TokenChunk | None) -> SequenceTotals:
        """Those of a chunk with these rows and usable tokens, None where it has none of those."""
        prompt = pair.prompt[rows.sequence]
        log_ratio, k3, max_k3 = np.zeros((3, len(prompt)))
        slope = np.full(len(prompt), np.nan)
        if tokens is not None:
            some = rows.n_usable > 0
            log_ratio[some] = tokens.per_sequence(tokens.log_ratio)
            k3[some] = tokens.per_sequence(tokens.k3_values)
            max_k3[some] = np.maximum.reduceat(tokens.k3_values, tokens.start)
            slope[some] = sequence_slopes(tokens)
        return cls(rows.sequence, prompt, rows.length, rows.n_usable, log_ratio, k3, max_k3, slope)


class PairSums:
    """What the metrics and curves of a pair are computed from; `update` takes it in chunk by chunk.

    Args:
        pair: Prompts and policy of the pair, e.g. its first chunk; its tokens are not read.
        clip: Bounds of `frac_outside_clip` on the importance ratio.
        bins: Edges `[K+1]` for further columns of the pair, by name: `binned` then has their sums.
        places: Whether `binned` and `density` are kept; metrics do without.
        scratch: Where the d of every token lies; None for memory.

    Raises:
        UsageError: `clip` is not a pair 0 < low < high.

    Attributes:
        prompt: Prompt of each sequence of the pair, empty ones included; likewise `prompt_ids`, `on_policy` and
            `off_policy_why` are those of `PairArrays`.
        n_prompts: P, prompts without tokens included, so that prompts of two pairs can be matched.
        n_tokens: N.
        excluded: What is left out.
        log_ratio: d of the usable tokens, nats, in parts of whole sequences.
        tokens: Sums over the usable tokens.
        binned: Sums by `"probability"` (of the rollout), by `"position"` and by the columns of `bins`.
        density: `[50, 50]` tokens by rollout and trainer probability in equal bins.
        longest: Largest position of a usable token, plus 1.
        largest: The tokens that differ most.
        log_mult_error: log of the largest mean of exp|d| − 1 over a sequence without unusable tokens.
    """

    def __init__(
        self,
        pair: PairArrays,
        *,
        clip: Clip = DEFAULT_CLIP,
        bins: Mapping[str, Floats] | None = None,
        places: bool = True,
        scratch: Scratch | None = None,
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
        edges = {"probability": PROBABILITY_EDGES, "position": POSITION_EDGES, **(bins or {})} if places else {}
        self.binned = {name: BinnedSums(of, self.n_prompts) for name, of in edges.items()}
        self.density: Ints = np.zeros((DENSITY_BINS, DENSITY_BINS), dtype=np.int64)
        self.longest = 0
        self.largest = LargestTokens.none()
        self.log_mult_error = -math.inf
        self._last_sequence = -1
        self._sequences: list[SequenceTotals] = []
        self.log_ratio = Column(scratch)

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
        tokens = None
        if rows.n_usable.any():
            tokens = TokenChunk.of(pair, rows, usable, self.n_prompts)
            self.tokens.update(tokens)
            self.log_ratio.append(tokens.log_ratio)
            if self.binned:
                self._update_places(tokens)
            self._update_mult_error(tokens, rows)
            self.largest = self.largest.joined(LargestTokens.of(pair, usable, self.n_tokens))
        self.excluded.update(pair, usable)
        self._sequences.append(SequenceTotals.of(pair, rows, tokens))
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
        return len(self.log_ratio)

    @property
    def mean_abs_all_finite(self) -> float | None:
        """Mean |d| with the finite ones of the excluded tokens, nats; None where there are none of those."""
        extra = self.excluded.n_tokens - self.excluded.n_nonfinite
        if not extra:
            return None
        return (float(self.tokens.abs_log_ratio.sum()) + self.excluded.abs_log_ratio) / (self.n_usable + extra)

    @property
    def sequences(self) -> SequenceTotals:
        """The sequences that have tokens, in their order."""
        whole, real = np.empty(0, dtype=np.int64), np.empty(0)
        parts = [SequenceTotals(whole, whole, whole, whole, real, real, real, real), *self._sequences]
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
