"""Sums that grow while chunks arrive: by prompt, by bin of a token property, and by length of a prefix.

Per-prompt sums keep their digits. Two things about the rows are known only at the end: their largest exponent, by which
sums of exponentials are scaled down, and their mean, about which squares are summed. Both are provisional here and
corrected with every chunk: the scale as in a streaming log-sum-exp, the centre by the pairwise update of Chan, Golub
and LeVeque (1983). Each chunk is centred on its own mean first, so that what is lost to rounding is small against the
spread that the rows do have.

Mean |d|, share of d², and E[ρ] = 1 per bin come from the sums by bin. Prefixes are of d and of three functions of it
over the first L tokens of every sequence, for a geometric grid of lengths; and of d over all of its tokens, since a
grid leaves the last ones out.

Shape legend: `N` tokens, `S` sequences, `P` prompts, `J` variables or columns, `K` bins, `G` lengths, `n` rows of a
chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import Ints, TokenChunk, group_sums, usable_rows
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.types import PairArrays

PROBABILITY_EDGES = np.array([0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
# The longest response is only known at the end: bins of one position up to here serve every equal width that a figure
# may choose, and beyond, an eighth of an octave is fine enough to choose from.
UNIT_POSITIONS = 96
_LONGEST = 1 << 24
POSITION_EDGES = np.unique(
    np.concatenate(
        [
            np.arange(UNIT_POSITIONS + 1.0),
            np.geomspace(UNIT_POSITIONS, _LONGEST, int(8 * np.log2(_LONGEST / UNIT_POSITIONS))).round(),
        ]
    )
)
# A factor of √2, up to 2²⁰ tokens; rounding leaves 1, 2, 3, 4, 6, 8, 11, 16, …
LENGTHS: Ints = np.unique(np.round(2.0 ** (np.arange(41) / 2)).astype(np.int64))


class Range:
    """The smallest and the largest of the values seen; `low > high` before the first."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, values: Floats) -> None:
        """Takes in `[n]` values, n ≥ 1."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def scale(self, factor: float) -> None:
        """As if every value so far had been multiplied by `factor` > 0."""
        if self.low <= self.high:
            self.low, self.high = self.low * factor, self.high * factor

    @property
    def varies(self) -> bool:
        """Whether the values differ by more than rounding."""
        largest = max(abs(self.low), abs(self.high))
        return self.high - self.low > 4 * float(np.finfo(np.float64).eps) * largest


class ShiftedSums:
    """Sums of exponentials, `[P, J]`, stored times exp(−shift)."""

    def __init__(self, n_prompts: int, n_columns: int) -> None:
        self.shift = 0.0
        self.sums = np.zeros((n_prompts, n_columns))

    def update(self, sums: Sequence[Floats], shift: float) -> None:
        """Adds J per-prompt sums `[P]` that were stored times exp(−`shift`)."""
        common = max(self.shift, shift)
        self.sums *= math.exp(self.shift - common)
        self.sums += np.stack(sums, axis=1) * math.exp(shift - common)
        self.shift = common


class CentredSums:
    """Sums of variables and of their products about their common means.

    Attributes:
        centre: `[J]` mean of each variable over all rows so far.
        sums: `[P, J]` Σ (x − centre).
        products: `[P, J, J]` Σ (x − centre)(y − centre).
        ranges: J ranges of the variables.
    """

    def __init__(self, n_prompts: int, n_variables: int) -> None:
        self.n = 0
        self.centre = np.zeros(n_variables)
        self.sums = np.zeros((n_prompts, n_variables))
        self.products = np.zeros((n_prompts, n_variables, n_variables))
        self.ranges = [Range() for _ in range(n_variables)]
        self._counts = np.zeros(n_prompts)

    def update(self, variables: Sequence[Floats], counts: Floats, per_prompt: Callable[[Floats], Floats]) -> None:
        """Takes in a chunk.

        Args:
            variables: J arrays `[n]`, n ≥ 1.
            counts: `[P]` rows of each prompt in the chunk.
            per_prompt: Sums `[n]` by prompt, to `[P]`.
        """
        n = len(variables[0])
        centre = np.array([values.mean() for values in variables])
        centred = [values - mean for values, mean in zip(variables, centre, strict=True)]
        sums = np.stack([per_prompt(y) for y in centred], axis=1)
        products = np.empty_like(self.products)
        for j, y in enumerate(centred):
            self.ranges[j].update(variables[j])
            for k, z in enumerate(centred[: j + 1]):
                products[:, j, k] = products[:, k, j] = per_prompt(y * z)
        common = self.centre + (centre - self.centre) * (n / (self.n + n))
        self.sums, self.products = (
            old + new
            for old, new in zip(
                _moved(self.sums, self.products, self._counts, self.centre - common),
                _moved(sums, products, counts, centre - common),
                strict=True,
            )
        )
        self.n, self.centre, self._counts = self.n + n, common, self._counts + counts

    def scale(self, factor: float) -> None:
        """As if every value so far had been multiplied by `factor`."""
        self.centre *= factor
        self.sums *= factor
        self.products *= factor**2
        for seen in self.ranges:
            seen.scale(factor)

    def of(self, *terms: tuple[int, ...]) -> list[Floats]:
        """`[P]` sums of variables `(j,)` and of products `(j, k)`; zero where a variable only varies by rounding."""
        zero = np.zeros(len(self.sums))
        sums = []
        for term in terms:
            values = self.sums[:, term[0]] if len(term) == 1 else self.products[:, term[0], term[1]]
            sums.append(values if all(self.ranges[j].varies for j in term) else zero)
        return sums


def _moved(sums: Floats, products: Floats, counts: Floats, step: Floats) -> tuple[Floats, Floats]:
    """The same sums about a centre that lies `step` `[J]` below the present one."""
    cross = sums[:, :, None] * step
    moved = products + cross + cross.transpose(0, 2, 1) + counts[:, None, None] * np.outer(step, step)
    return sums + counts[:, None] * step, moved


class BinnedSums:
    """Sums over the tokens of each prompt in each bin [edges[k], edges[k+1]), the outer bins open-ended.

    Attributes:
        edges: `[K+1]`
        count: `[P, K]` tokens.
        abs_log_ratio: `[P, K]` Σ |d|, nats.
        squared_log_ratio: `[P, K]` Σ d².
        ratio_excess: `[P, K]` Σ (ρ − 1), times exp(−`shift`).
        shift: 0 unless ρ could overflow; a test of E[ρ] = 1 has no scale and can ignore it.
    """

    def __init__(self, edges: Floats, n_prompts: int) -> None:
        self.edges = edges
        self.shift = 0.0
        self._n_prompts = n_prompts
        # Grown with the largest bin seen: of the positions' many bins short responses need few.
        self._sums = np.zeros((4, n_prompts, 0))

    def update(self, tokens: TokenChunk, values: NDArray[Any]) -> None:
        """Takes in a chunk whose property is `values` `[n]`. Tokens whose property is NaN are in no bin."""
        known = ~np.isnan(values)
        keep: Any = slice(None) if known.all() else known
        values = values[keep]
        if len(values) == 0:
            return
        bins = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, len(self.edges) - 2)
        self._grow(int(bins.max()) + 1)
        width = self._sums.shape[2]
        prompts, of_token = tokens.own_prompts
        cell = of_token[keep] * width + bins
        common = max(self.shift, scales.shift_of(tokens.log_ratio[keep]))
        self._sums[3] *= np.exp(self.shift - common)
        self.shift = common
        excess = tokens.ratio_excess(common)[keep]
        columns = (None, tokens.abs_log_ratio[keep], tokens.squared_log_ratio[keep], excess)
        for sums, column in zip(self._sums, columns, strict=True):
            sums[prompts] += np.bincount(cell, column, minlength=len(prompts) * width).reshape(-1, width)

    def _grow(self, width: int) -> None:
        missing = width - self._sums.shape[2]
        if missing > 0:
            self._sums = np.pad(self._sums, ((0, 0), (0, 0), (0, missing)))

    def merged(self, first: NDArray[np.int64], end: float) -> BinnedSums:
        """The same sums in wider bins, which begin at the bins `first` (increasing, from 0); the last ends at `end`."""
        whole = BinnedSums(np.append(self.edges[first], end), self._n_prompts)
        whole.shift = self.shift
        self._grow(int(first[-1]) + 1)
        whole._sums = np.add.reduceat(self._sums, first, axis=2)
        return whole

    def _column(self, index: int) -> Floats:
        self._grow(len(self.edges) - 1)
        return np.asarray(self._sums[index])

    @property
    def count(self) -> Floats:
        return self._column(0)

    @property
    def abs_log_ratio(self) -> Floats:
        return self._column(1)

    @property
    def squared_log_ratio(self) -> Floats:
        return self._column(2)

    @property
    def ratio_excess(self) -> Floats:
        return self._column(3)


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
