"""Ranges of numbers: largest activations, and weights against the steps that move them.

Activations are streamed: maxima and tail quantiles by tensor, by context length, first tokens apart.

The first token of a sequence often carries activations hundreds of times larger than any other (an attention sink; Sun
et al. 2024, "Massive Activations in Large Language Models"), so it never stands in for the rest.

An engine lags behind the trainer's FP32 masters, because its weights have 16 bits. A step of Adam moves a weight by the
learning rate times u = m̂ / (√v̂ + ε), whatever the gradient's scale, so u is simulated once and serves every learning
rate. An engine sees a master only when it rounds to another 16-bit number: after half a unit in the last place (ulp)
from a checkpoint that lies on the grid, and after less or more from a master anywhere within that half unit, as after
many steps.

Shape legend: `M` tensors, `T` tokens of a sequence, `C` bins of context length, `B` bins of magnitude, `S` sequences,
`W` sampled weights, `R` learning rates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.floats import FP16, FloatFormat

Floats = NDArray[np.float64]
# Of the paper's AdamW (arXiv 2510.26788).
BETAS = (0.9, 0.95)
# Positions 0, 1, 2–3, 4–7, …: a bin an octave.
CONTEXT_BINS = 32
_PER_OCTAVE = 8
_LOWEST, _HIGHEST = -40, 128
_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2


@dataclass(frozen=True)
class AdamMotion:
    """The motion of weights under Adam, at a learning rate of 1.

    Attributes:
        first: `[W]` |u| of the first step.
        steady: `[W]` mean |u| of later steps.
        steps: Steps that were simulated.
        passed: Per format and learning rate, `[W]` the first step after which a weight from the grid rounds to another
            number; 0 where none did.
        passed_generic: The same of a weight that starts anywhere within half a unit of its number.
        alive: `[W]` weights that any sequence gave a gradient.
    """

    first: Floats
    steady: Floats
    steps: int
    passed: dict[tuple[str, float], NDArray[np.int64]]
    passed_generic: dict[tuple[str, float], NDArray[np.int64]]
    alive: NDArray[np.bool_]


def simulate_adam(
    weights: Floats,
    gradients: NDArray[np.floating],
    rates: tuple[float, ...],
    formats: tuple[FloatFormat, ...],
    *,
    steps: int = 500,
    batch: int = 8,
    betas: tuple[float, float] = BETAS,
    epsilon: float = 1e-8,
    seed: int = 0,
) -> AdamMotion:
    """Adam on gradients that are drawn from those of some sequences, each with a random sign for its advantage.

    Signs are drawn anew at each step, so gradients are noise without drift, as late in a run, and a weight walks at
    random. One that is always pushed the same way moves by the whole learning rate in every step (|u| = 1), and is the
    first to reach the engine.

    Args:
        weights: `[W]` sampled weights; each format's copy of them is where its engine starts.
        gradients: `[S, W]` their gradients, a row per sequence. A weight with one that is not finite counts as without.
        rates: Learning rates.
        formats: Of engines.
        steps: How many to simulate.
        batch: Sequences of a step.
        betas, epsilon: Of Adam.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    rows = np.asarray(gradients, dtype=np.float64)
    scale = np.abs(rows).max(axis=0)
    alive = np.isfinite(scale) & (scale > 0) & np.isfinite(weights)
    # Adam does not see a gradient's scale, up to ε: taken out so that squares of tiny ones do not vanish.
    rows = rows[:, alive] / scale[alive]
    floor = epsilon / scale[alive]
    m, v, moved = np.zeros(rows.shape[1]), np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    first, total = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    live = np.asarray(weights, dtype=np.float64)[alive]
    half = {form.name: form.ulp(form.rounded(live)) / 2 for form in formats}
    offset = {form.name: half[form.name] * draw.uniform(-1, 1, rows.shape[1]) for form in formats}
    passed = {(form.name, rate): np.zeros(rows.shape[1], np.int64) for form in formats for rate in rates}
    generic = {key: reached.copy() for key, reached in passed.items()}
    settled = min(steps // 2, 100)
    for step in range(1, steps + 1):
        chosen = draw.integers(len(rows), size=batch)
        gradient = (draw.choice((-1.0, 1.0), size=batch)[:, None] * rows[chosen]).sum(axis=0) / batch
        m += (1 - betas[0]) * (gradient - m)
        v += (1 - betas[1]) * (gradient**2 - v)
        u = (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + floor)
        moved -= u
        if step == 1:
            first = np.abs(u)
        if step > settled:
            total += np.abs(u)
        for name, rate in passed:
            for found, at in ((passed, rate * moved), (generic, rate * moved + offset[name])):
                reached = found[name, rate]
                reached[(reached == 0) & (np.abs(at) > half[name])] = step
    return AdamMotion(
        _spread(first, alive),
        _spread(total / max(1, steps - settled), alive),
        steps,
        {key: _spread(reached, alive).astype(np.int64) for key, reached in passed.items()},
        {key: _spread(reached, alive).astype(np.int64) for key, reached in generic.items()},
        alive,
    )


def _spread(values: NDArray[np.generic], alive: NDArray[np.bool_]) -> Floats:
    found = np.zeros(len(alive))
    found[alive] = values
    return found


@dataclass
class PeakSums:
    """Statistics of each tensor's token peaks: max |x| over the channels of a token.

    Attributes:
        names: `M` tensors, in the order in which a forward pass makes them.
        first: `[M]` the largest peak of a sequence's first token.
        rest: `[M]` of all other tokens.
        by_context: `[M, C]` the largest peak at positions of an octave; 0 where none was seen.
        histogram: `[M, B]` tokens other than first ones, by log2 of their peak.
        n_overflow, n_nonfinite: `[M]` tokens, first ones included, with a peak that FP16 rounds to infinity, and that
            was not finite to begin with.
        at: `[M, 2]` index of the sequence and position of the largest peak.
        overflow_by_sequence: Of each sequence, tokens with an overflow in any tensor that counts.
        lengths: Tokens of each sequence.
    """

    names: tuple[str, ...]
    first: Floats = field(init=False)
    rest: Floats = field(init=False)
    by_context: Floats = field(init=False)
    histogram: NDArray[np.int64] = field(init=False)
    n_overflow: NDArray[np.int64] = field(init=False)
    n_nonfinite: NDArray[np.int64] = field(init=False)
    at: NDArray[np.int64] = field(init=False)
    overflow_by_sequence: list[int] = field(init=False, default_factory=list)
    lengths: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        m = len(self.names)
        self.first, self.rest = np.zeros(m), np.zeros(m)
        self.by_context = np.zeros((m, CONTEXT_BINS))
        self.histogram = np.zeros((m, _BINS), np.int64)
        self.n_overflow, self.n_nonfinite = np.zeros(m, np.int64), np.zeros(m, np.int64)
        self.at = np.zeros((m, 2), np.int64)

    def update(self, peaks: Floats, counted: NDArray[np.bool_], placed: NDArray[np.bool_]) -> None:
        """Adds a sequence.

        Args:
            peaks: `[M, T]` token peaks; a tensor that is not placed has its one peak at every position.
            counted: `[M]` tensors whose overflows make a token one with an overflow.
            placed: `[M]` whether a tensor's peaks belong to tokens. One that does not has no part in first tokens,
                positions and quantiles; it counts as one token, and its `at` has the position −1.
        """
        finite = np.isfinite(peaks)
        values = np.where(finite, peaks, 0.0)
        each = np.where(placed, peaks.shape[1], 1)
        over = ~finite | (values >= FP16.overflows_from)
        self.n_nonfinite += np.minimum((~finite).sum(1), each)
        self.n_overflow += np.minimum(over.sum(1), each)
        tokens = over[counted & placed].any(0).sum()
        self.overflow_by_sequence.append(int(max(tokens, over[counted].any())))
        largest = values.max(1)
        where = np.where(placed, values.argmax(1), -1)
        grown = largest > self.largest
        self.at[grown] = np.stack([np.full(len(largest), len(self.lengths)), where], axis=1)[grown]
        self.first[placed] = np.maximum(self.first, values[:, 0])[placed]
        self.rest[~placed] = np.maximum(self.rest, largest)[~placed]
        bins = np.frexp(np.arange(values.shape[1], dtype=np.float64))[1]
        for index in np.unique(bins):
            seen = np.maximum(self.by_context[:, index], values[:, bins == index].max(1))
            self.by_context[placed, index] = seen[placed]
        if values.shape[1] > 1:
            rest = values[placed, 1:]
            self.rest[placed] = np.maximum(self.rest[placed], rest.max(1))
            rows = np.flatnonzero(placed)[:, None]
            np.add.at(self.histogram, (np.broadcast_to(rows, rest.shape), _bin_of(rest)), 1)
        self.lengths.append(peaks.shape[1])

    def widened(self, names: tuple[str, ...]) -> PeakSums:
        """These sums with further tensors behind, which only a later sequence made; itself where there are none."""
        if names == self.names:
            return self
        wider, n = PeakSums(names), len(self.names)
        for name, array in self.arrays().items():
            found = getattr(wider, name)
            if isinstance(found, list):
                found.extend(array.tolist())
            else:
                found[:n] = array
        return wider

    @property
    def largest(self) -> Floats:
        """`[M]` the largest finite peak of any token."""
        return np.maximum(self.first, self.rest)

    def quantile(self, level: float) -> Floats:
        """`[M]` quantile of the peaks of tokens other than first ones, within 9 %: the upper end of its bin."""
        counts = self.histogram.cumsum(1)
        total = counts[:, -1:]
        index = (counts < level * total).sum(1)
        upper = np.exp2(_LOWEST + np.minimum(index, _BINS - 1) / _PER_OCTAVE)
        return np.where(total[:, 0] > 0, np.minimum(np.where(index == 0, 0.0, upper), self.rest), 0.0)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For a file."""
        named = ("first", "rest", "by_context", "histogram", "n_overflow", "n_nonfinite", "at")
        lists = ("overflow_by_sequence", "lengths")
        return {name: getattr(self, name) for name in named} | {n: np.array(getattr(self, n), np.int64) for n in lists}

    @classmethod
    def of_arrays(cls, names: tuple[str, ...], arrays: dict[str, NDArray[Any]]) -> PeakSums:
        """From what `arrays` gave."""
        sums = cls(names)
        for name, array in sums.arrays().items():
            kept = isinstance(getattr(sums, name), list)
            setattr(sums, name, arrays[name].tolist() if kept else arrays[name].astype(array.dtype))
        return sums


def context_of(index: int) -> tuple[int, int]:
    """First and last position of a bin of `PeakSums.by_context`."""
    return (0, 0) if index == 0 else (1 << (index - 1), (1 << index) - 1)


def _bin_of(values: Floats) -> NDArray[np.int64]:
    """Bins of width 1/8 octave; 0 for what is smaller than them all."""
    with np.errstate(divide="ignore"):
        logs = np.log2(values)
    return np.asarray(np.clip(np.ceil((logs - _LOWEST) * _PER_OCTAVE), 0, _BINS - 1), dtype=np.int64)
