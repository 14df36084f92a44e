"""Constants that a framework wrote where it has no log-prob: runs of one value, which chance does not make.

A single −1 is a log-prob like any other. Eight in a row are not, unless log-probs are so coarse that they repeat. The
rule asks how likely a run is under the grid on which the sequence's other values lie, and flags it where the chance is
below 1e-12:

- A token repeats the value v before it with a probability of at most ½·s/|v|, and at most ½, where s is the step of the
  grid at v. It says that the density of log-probs is at most ½/|v|. On 9,243 tokens of SmolLM2-135M rounded to grids of
  ¼, ⅛, .1, 1/16, … nats, to 8 and 11 bits and to 1–6 decimals, repeats are 3 to 20 times rarer than that.
- The step s is the coarsest one that explains nine of ten other values of the sequence: 16-bit logits (multiples of
  ¼ … 1/32), decimals, 16-bit storage, 16-bit probabilities. It is never below 1e-4, so that float32 needs no proof.
  With fewer than eight other values it is the coarsest step that explains v itself.
- Where the step is coarse, and the other side is recorded and lies close to v throughout the run, the run is not
  flagged: the values of a model with random weights, or of a loop that repeats one token, agree on both sides.
- Values above `NEAR_CERTAIN` are left alone: near-certain tokens have equal log-probs, at most 0.06 nats from 0.
- 0 has a rule of its own. Of three or more zeros in a row of which the other side contradicts at least half, all are
  placeholders: the others stand at tokens that the other side finds likely.

A float32 sequence needs 4 to 6 equal values, one on a 16-bit grid 6 to 10, one on a grid of ¼ nats up to 41.

Shape legend: `N` tokens, those of a sequence next to each other in the order of their positions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEAR_CERTAIN = -1 / 16
# A run this short is never flagged.
SHORTEST_RUN = 4
SHORTEST_ZEROS = 3
_LOG_CHANCE = math.log(1e-12)
_DENSITY = 0.5
_FINEST_STEP = 1e-4
_ENOUGH_OTHERS = 8
_EXPLAINED = 0.9
# Steps in nats that a value may be a multiple of, the coarsest first; 2^-7 is that of a probability in bfloat16.
_COARSE_STEPS = (1 / 4, 1 / 8, 0.1, 1 / 16, 1 / 32, 0.01)
_BFLOAT16_STEP, _FLOAT16_STEP = 2.0**-7, 2.0**-10
# Float32 bits below the significand of each 16-bit format; a value is on its grid within 8 units of float32, so that
# one that was written with seven digits is.
BFLOAT16_BITS, FLOAT16_BITS = 16, 13
_SLACK = 8
# The other side agrees with a value within this many nats and this share of it.
_NEAR, _NEAR_SHARE = 0.1, 2.0**-6

Runs = tuple[NDArray[np.int64], NDArray[np.int64]]


def on_binary_grid(values: NDArray[np.floating[Any]], dropped_bits: int) -> NDArray[np.bool_]:
    """`[N]` which values are, in float32, those of a format with `dropped_bits` fewer bits, to seven digits."""
    bits = values.astype(np.float32).view(np.uint32)
    return np.asarray(((bits + np.uint32(_SLACK)) & np.uint32((1 << dropped_bits) - 1)) <= 2 * _SLACK)


def runs_of(same: NDArray[np.bool_]) -> Runs:
    """First tokens and lengths of the runs of `[N−1]` `same`, which says whether a token continues the one before."""
    edges = np.diff(same.astype(np.int8), prepend=0, append=0)
    start = np.flatnonzero(edges == 1)
    return start, np.flatnonzero(edges == -1) - start + 1


def constant_runs(
    values: NDArray[np.floating[Any]],
    sequence: NDArray[np.int64],
    position: NDArray[np.int64],
    other: NDArray[np.floating[Any]] | None = None,
    contradicted: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """`[N]` which of one side's values belong to a run of a constant.

    Args:
        values: `[N]` log-probs of one side, nats; non-finite ones are in no run.
        sequence: `[N]` index of each token's sequence; all tokens that count of a sequence are here.
        position: `[N]` index in the response; a run has consecutive ones.
        other: `[N]` log-probs of the other side, None where it is not recorded.
        contradicted: `[N]` zeros that the other side contradicts.
    """
    flagged = np.zeros(len(values), np.bool_)
    if len(values) < SHORTEST_ZEROS:
        return flagged
    same = (values[1:] == values[:-1]) & (values[1:] <= NEAR_CERTAIN)
    # Without this many repeats in a row there is nothing to look at, which is the rule.
    if (same[2:] & same[1:-1] & same[:-2]).any():
        same &= _adjacent(sequence, position)
        for start, length in zip(*runs_of(same), strict=True):
            if length >= SHORTEST_RUN:
                first, end = np.searchsorted(sequence, [sequence[start], sequence[start] + 1])
                run = slice(int(start), int(start + length))
                flagged[run] = _is_constant(values[first:end], float(values[start]), int(length), other, run)
    if contradicted is not None and contradicted.any():
        zeros = (values[1:] == 0) & (values[:-1] == 0) & _adjacent(sequence, position)
        for start, length in zip(*runs_of(zeros), strict=True):
            run = slice(int(start), int(start + length))
            if length >= SHORTEST_ZEROS and 2 * np.count_nonzero(contradicted[run]) >= length:
                flagged[run] = True
    return flagged


def _adjacent(sequence: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`[N−1]` whether a token follows the one before it in the same response."""
    return np.asarray((sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1] + 1))


def _is_constant(
    values: NDArray[np.floating[Any]],
    value: float,
    length: int,
    other: NDArray[np.floating[Any]] | None,
    run: slice,
) -> bool:
    """Whether a run of `value` among a sequence's `values` is longer than chance makes it."""
    agrees = other is not None and _agrees(other[run], value)
    if not agrees and _beyond_chance(length, _step(np.empty(0), value), value):
        return True  # on the coarsest grid, so on every one
    step = _step(values, value)
    return _beyond_chance(length, step, value) and not (agrees and step > _FINEST_STEP)


def _agrees(other: NDArray[np.floating[Any]], value: float) -> bool:
    """Whether the other side's log-probs are close to the value throughout."""
    return bool((np.abs(other - value) <= _NEAR + _NEAR_SHARE * -value).all())


def _beyond_chance(length: int, step: float, value: float) -> bool:
    """Whether chance makes no run of a value of this length on a grid with this step."""
    chance = min(_DENSITY, _DENSITY * step / -value)
    return (length - 1) * math.log(chance) <= _LOG_CHANCE


def _step(values: NDArray[np.floating[Any]], value: float) -> float:
    """Step at `value`, in nats, of the coarsest grid on which it and a sequence's other values lie."""
    others = np.unique(values[(values <= NEAR_CERTAIN) & (values != value) & np.isfinite(values)])
    judged = np.append(others, value) if len(others) >= _ENOUGH_OTHERS else np.array([value])
    for step in _COARSE_STEPS:
        if _explains(np.abs(judged / step - np.rint(judged / step)) * step <= 1e-6):
            return step
    probabilities = np.exp(judged)
    for bits, step in ((BFLOAT16_BITS, _BFLOAT16_STEP), (FLOAT16_BITS, _FLOAT16_STEP)):
        if _explains(on_binary_grid(judged, bits)):
            return step * -value
        if _explains(on_binary_grid(probabilities, bits)):
            return step
    return 1e-3 if _explains(np.abs(judged * 1e3 - np.rint(judged * 1e3)) <= 1e-3) else _FINEST_STEP


def _explains(on_grid: NDArray[np.bool_]) -> bool:
    """Whether a grid has the value in question, which is the last, and nine of ten others."""
    return bool(on_grid[-1]) and float(on_grid.mean()) >= _EXPLAINED
