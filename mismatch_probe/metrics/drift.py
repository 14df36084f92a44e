"""Score drift: how much of the difference μ − π is the same at every position, and not noise that averages out.

A position's difference is a vector over the vocabulary, too long to keep. Its count sketch (Charikar, Chen and
Farach-Colton 2002) is kept instead: every token adds its entry, with a sign, to one of `DRIFT_BUCKETS` sums. The sketch
is linear, so sketches add up as the vectors do, and over the draw of buckets and signs E⟨s(x), s(y)⟩ = ⟨x, y⟩.

Shape legend: `R` positions, `V` vocabulary, `P` prompts, `B` buckets, `K` choices of signs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mismatch_probe.metrics.intervals import Floats, join_why
from mismatch_probe.types import DRIFT_BUCKETS, MetricValue

_HASH_SEED = 260920807  # part of the format: sketches of other seeds cannot be added
_FLIPS = 1000
_LEAST_PROMPTS = 6
_QUANTILE = 0.95
_ROUNDING = 1e-12  # of the value's square
NO_SKETCH = "the table has no sketches of μ − π; an earlier release wrote it, or an engine that makes none"


@lru_cache(maxsize=4)
def _buckets(vocabulary: int) -> tuple[NDArray[np.int64], Floats]:
    """Bucket and sign `[V]` of every token: the same in every process, and for a token whatever V is.

    Raw output of a bit generator is all that NumPy promises to keep from release to release.
    """
    raw = np.random.PCG64(_HASH_SEED).random_raw(vocabulary)
    return (raw % DRIFT_BUCKETS).astype(np.int64), 1.0 - 2.0 * (raw >> np.uint64(63)).astype(np.float64)


def sketch(difference: Floats) -> NDArray[np.float32]:
    """Count sketch `[R, B]` of vectors `[R, V]`. ‖s(x)‖² has mean ‖x‖² and relative error of about √(2/B)."""
    bucket, sign = _buckets(difference.shape[1])
    rows = [np.bincount(bucket, row * sign, minlength=DRIFT_BUCKETS) for row in difference]
    return np.array(rows, np.float32).reshape(len(difference), DRIFT_BUCKETS)


def drift_columns(
    rollout_logits: NDArray[Any], trainer_logits: NDArray[Any], temperature: float = 1.0
) -> dict[str, NDArray[Any]]:
    """What `score_drift` needs of positions, from logits `[R, V]`, −inf for tokens that cannot occur.

    Returns:
        `drift_square`, Σ (μ − π)² `[R]` float64, and `drift_sketch`, the count sketch of μ − π, `[R, B]` float32. Rows
        with NaN give NaN.

    Raises:
        ValueError: The shapes differ.
    """
    if rollout_logits.shape != trainer_logits.shape:
        raise ValueError(f"logits of shapes {rollout_logits.shape} and {trainer_logits.shape} cannot be compared")
    with np.errstate(invalid="ignore"):  # of rows with NaN, or without any token that can occur
        mu, pi = (special.softmax(x.astype(np.float64) / temperature, axis=1) for x in (rollout_logits, trainer_logits))
        difference = mu - pi
    square = np.einsum("rv,rv->r", difference, difference)
    sketches = sketch(difference)
    sketches[np.isnan(square)] = np.nan
    return {"drift_square": square, "drift_sketch": sketches}


def score_drift(
    sketches: NDArray[np.float32] | None,
    square: Floats | None,
    times: Floats,
    prompt: NDArray[np.int64],
    seed: int = 0,
) -> MetricValue:
    """‖Σ w x‖ / Σw ÷ √(Σ w‖x‖² / Σw), x = μ − π: 1 where x is the same everywhere, about 1/√R where it is noise.

    ‖Σ w x‖² comes from the sketches, without bias: the terms w²‖x‖² of single positions are put in exactly, and only
    products of two positions are estimated. Where the estimate of the value's square lies below 0 or above 1, the value
    is 0 or 1; the test takes it as it is. Signs of whole prompts are flipped to test the hypothesis that a prompt's
    differences are as likely with the other sign.

    Args:
        sketches: `[R, B]` of x; None where they are not known, NaN in positions where they are not.
        square: `[R]` ‖x‖².
        times: `[R]` w, how many positions each stands for.
        prompt: `[R]` prompt of each position, from 0.
        seed: Of the flips.
    """
    if sketches is None or square is None:
        return MetricValue(None, why=NO_SKETCH)
    keep = np.isfinite(square) & np.isfinite(sketches).all(axis=1)
    if not keep.any():
        return MetricValue(None, why=f"finite at none of the {len(keep)} compared positions")
    why = "" if keep.all() else f"computed over the {int(keep.sum())} of {len(keep)} positions that are finite"
    square, times = square[keep], times[keep]
    scale = np.sqrt(square.max())
    if scale == 0:
        return MetricValue(None, why=join_why(why, "μ and π are equal at every compared position"))
    present, index = np.unique(prompt[keep], return_inverse=True)
    vectors = sketches[keep].astype(np.float64) * (times / scale)[:, None]
    sums = np.zeros((len(present), vectors.shape[1]))
    np.add.at(sums, index, vectors)
    square = square / scale**2
    exact_less_sketched = float((times**2 * square).sum() - (vectors**2).sum())
    largest = float(times.sum() * (times * square).sum())

    def squares(signs: Floats) -> Floats:
        """The value's square `[K]` under signs `[K, P]`, as estimated."""
        return np.asarray((((signs @ sums) ** 2).sum(axis=1) + exact_less_sketched) / largest)

    square_found = float(squares(np.ones((1, len(present))))[0])
    value = _root(square_found)
    if len(present) < _LEAST_PROMPTS:
        return MetricValue(value, why=join_why(why, f"too few prompts for a test: fewer than {_LEAST_PROMPTS}"))
    null = squares(np.random.default_rng(seed).choice([-1.0, 1.0], (_FLIPS, len(present))))
    # With few prompts, flips repeat the signs of the data, up to rounding.
    p = (1 + np.count_nonzero(null >= square_found - _ROUNDING)) / (1 + _FLIPS)
    reached = (
        f"sign flips of prompts reach {_root(float(np.quantile(null, _QUANTILE))):.2g} in 5 % of draws (p = {p:.2g})"
    )
    return MetricValue(value, why=join_why(why, reached))


def _root(square: float) -> float:
    return float(np.sqrt(np.clip(square, 0.0, 1.0)))
