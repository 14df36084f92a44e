"""What a temperature makes of a log-prob, when of a distribution only one token's probability is known.

The rest of the distribution is taken for K equally likely tokens. With p the known probability and β = 1/T,
Σ p_j^β = p^β + (1 − p)^β K^(1−β).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REST = (0.0, 1.0, 2.0, 3.0, 4.5)
"""Values of log K that are tried, nats."""


def log_power_sum(logprob: Floats, beta: float, rest: Floats | float) -> Floats:
    """`[N]` log Σ p_j^β.

    Args:
        logprob: `[N]` log p of one token.
        beta: β.
        rest: log K, nats: entropy of what is left of the distribution.
    """
    b = np.minimum(logprob, 0.0)
    log_left = np.log(np.maximum(-np.expm1(b), 1e-300))
    return np.asarray(np.logaddexp(beta * b, beta * log_left + (1 - beta) * rest))


def rest_of(logprob: Floats, entropy: Floats) -> Floats:
    """`[N]` log K by the entropy of the distribution `[N]`, nats, at least 0; 0 where the entropy is not known."""
    b = np.minimum(logprob, 0.0)
    p, q = np.exp(b), np.maximum(-np.expm1(b), 1e-12)
    return np.where(np.isfinite(entropy), np.clip((entropy + p * b + q * np.log(q)) / q, 0.0, 15.0), 0.0)
