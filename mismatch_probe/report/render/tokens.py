"""How a token is shown by the size of its |d|, the same on a page and in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.report.format import number

if TYPE_CHECKING:
    from mismatch_probe.report.model import Token

EDGES = (1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.3, 1.0)
"""Lower limits of the levels 1 to 7 of |d|, nats; level 0 lies below the first."""
LEVELS = tuple(f"≥ {edge:g}" for edge in EDGES)


def level(token: Token) -> int:
    """0 to 7, and 8 where a log-prob is not finite."""
    size = abs(token.trainer_logprob - token.rollout_logprob)
    return sum(size >= edge for edge in EDGES) if size < float("inf") else len(EDGES) + 1


def details(token: Token) -> str:
    """log μ, log π, d, rank and entropy in one line; nats."""
    parts = [
        f"log μ {number(token.rollout_logprob)}",
        f"log π {number(token.trainer_logprob)}",
        f"d {number(token.trainer_logprob - token.rollout_logprob)}",
    ]
    parts += [] if token.rank is None else [f"rank {token.rank}"]
    parts += [] if token.entropy is None else [f"entropy {number(token.entropy)}"]
    return " · ".join(parts)
