"""Exact divergences of two policies at a position, from the full rows of logits on both sides.

Everything is float64 and sums over the whole vocabulary, in forms whose terms are small where the two policies are
close: KL as Σ μ·(e − x), x = log π − log μ, e = expm1(x), which adds Σ(π − μ) = 0 to the textbook sum and so never is
the difference of two large numbers (METRICS.md, "Exact metrics"). The other sums follow from e as well: π = μ(1 + e).

Shape legend: `R` positions, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.intervals import Floats

# What `divergences` returns, which is what `exact.parquet` holds of a position.
DIVERGENCES = (
    "kl",
    "kl_reverse",
    "js",
    "tv",
    "flip",
    "entropy_rollout",
    "entropy_trainer",
    "chi2",
    "k1_square",
    "k2_square",
    "k3_square",
)


def divergences(
    rollout_logits: NDArray[Any], trainer_logits: NDArray[Any], temperature: float = 1.0
) -> dict[str, Floats]:
    """Divergences of μ = softmax(rollout_logits / temperature) and π = softmax(trainer_logits / temperature).

    Args:
        rollout_logits: `[R, V]`, −inf for tokens that cannot occur.
        trainer_logits: `[R, V]`
        temperature: Of the sampling law.

    Returns:
        `[R]` float64 per key of `DIVERGENCES`, in nats where they have a unit: `kl` is KL(μ‖π) and `kl_reverse` KL(π‖μ);
        `js` Jensen–Shannon; `tv` total variation; `flip` 1 where the likeliest tokens differ; `chi2` Σ π²/μ − 1;
        `k1_square`, `k2_square`, `k3_square` the second moments under y ~ μ of the estimators k1 = −d, k2 = ½d² and
        k3 = expm1(d) − d, d = log π(y) − log μ(y) (their means are `kl`, ½·`k1_square` and `kl`). Rows with NaN give
        NaN; a token that π excludes and μ does not gives an infinite `kl`.

    Raises:
        ValueError: The shapes differ.
    """
    if rollout_logits.shape != trainer_logits.shape:
        raise ValueError(f"logits of shapes {rollout_logits.shape} and {trainer_logits.shape} cannot be compared")
    with np.errstate(all="ignore"):  # rows with NaN, −inf or an overflow are dealt with by their results
        log_mu, mu = _log_softmax(rollout_logits, temperature)
        log_pi, pi = _log_softmax(trainer_logits, temperature)
        # The law of the tokens that both sides can produce, and what each side gives to tokens that only it can.
        both = (mu > 0) & (pi > 0)
        x = np.where(both, log_pi - log_mu, 0.0)
        e = np.expm1(x)
        half = np.log1p(0.5 * e)  # of the middle of both policies, over μ
        shared = np.where(both, mu, 0.0)
        only_mu, only_pi = (np.where(both, 0.0, p).sum(axis=1) for p in (mu, pi))
        square, k3 = x * x, e - x
        moments = {"k1_square": square, "k2_square": 0.25 * square * square, "k3_square": k3 * k3}
        infinite = np.where(only_mu > 0, np.inf, 0.0)
        sums = {
            # Over the shared tokens alone Σ(π − μ) is only_mu − only_pi, which is put back.
            "kl": (shared * k3).sum(axis=1) + only_pi + infinite,
            "kl_reverse": (shared * (x + e * x - e)).sum(axis=1) + only_mu + np.where(only_pi > 0, np.inf, 0.0),
            "js": 0.5 * (shared * (e * (x - half) + x - 2.0 * half)).sum(axis=1)
            + 0.5 * np.log(2) * (only_mu + only_pi),
            "tv": 0.5 * (np.abs(shared * e).sum(axis=1) + only_mu + only_pi),
            "flip": 1.0 * (rollout_logits.argmax(axis=1) != trainer_logits.argmax(axis=1)),
            "entropy_rollout": -np.where(mu > 0, mu * log_mu, 0.0).sum(axis=1),
            "entropy_trainer": -np.where(pi > 0, pi * log_pi, 0.0).sum(axis=1),
            "chi2": (shared * e * e).sum(axis=1) + only_mu + np.where(only_pi > 0, np.inf, 0.0),
            **{key: (shared * values).sum(axis=1) + infinite for key, values in moments.items()},
        }
    broken = np.isnan(rollout_logits).any(axis=1) | np.isnan(trainer_logits).any(axis=1)
    return {key: np.where(broken, np.nan, sums[key]) for key in DIVERGENCES}


def _log_softmax(logits: NDArray[Any], temperature: float) -> tuple[Floats, Floats]:
    """log softmax and softmax `[R, V]` in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)
    total = weights.sum(axis=1)[:, None]
    return scaled - np.log(total), weights / total
