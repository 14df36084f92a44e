"""Sums behind the fits of one property of a token on another, and what else takes both log-probs of every token.

Shape legend: `n` usable tokens of a chunk, `s` its sequences that have any, `P` prompts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import Side, TokenChunk
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.metrics.sums import CentredSums

# Columns of a pair with the entropy of each side's distribution at a token, nats; NaN where it is not known.
ENTROPY_COLUMNS: dict[Side, Literal["rollout_entropy", "entropy"]] = {
    "rollout": "rollout_entropy",
    "trainer": "entropy",
}
# Of fewer tokens a sequence's slope says little.
SLOPE_TOKENS = 10
# (1−π)/(1−μ) is 1 + x; its logarithm is taken from x down to −x here, and below from 1 − π, which then has more digits.
_NEAR = 0.5
# Below this 1 − μ counts as nothing: quotients by it could overflow.
_LEAST = 1e-200
# Beyond this |d| exp(d) could overflow.
_HUGE = 20.0
_ROUNDED = 16 * float(np.finfo(np.float64).eps)


class KnownSums:
    """Sums `[P]` over the tokens for which a property is known.

    Attributes:
        counts: Those tokens.
        sums: `[P, J]` of J columns.
    """

    def __init__(self, n_prompts: int, n_columns: int) -> None:
        self.counts = np.zeros(n_prompts)
        self.sums = np.zeros((n_prompts, n_columns))

    def update(self, tokens: TokenChunk, known: np.ndarray[tuple[int], np.dtype[np.bool_]], *columns: Floats) -> None:
        """Adds `columns` `[n]` of the tokens that are `known` `[n]`."""
        if not known.any():
            return
        whole = bool(known.all())
        self.counts += tokens.counts if whole else tokens.per_prompt(known)
        for j, column in enumerate(columns):
            self.sums[:, j] += tokens.per_prompt(column if whole else np.where(known, column, 0.0))


class FitSums:
    """What fits, entropies and the binary KL of a pair are computed from; fed chunk by chunk.

    Attributes:
        line: b and d about their means.
        tail: 1 − e^b and |d| about their means.
        binary_kl: Σ of the binary KL, over the tokens at which it is finite.
        entropy: Σ k3 and Σ H of the trainer.
        temperature: By the side that may have been sampled from, Σ x·d and Σ x², x = its log-prob plus its entropy.
    """

    def __init__(self, n_prompts: int) -> None:
        self.line, self.tail = CentredSums(n_prompts, 2), CentredSums(n_prompts, 2)
        self.binary_kl, self.entropy = KnownSums(n_prompts, 1), KnownSums(n_prompts, 2)
        self.temperature: dict[Side, KnownSums] = {side: KnownSums(n_prompts, 2) for side in ENTROPY_COLUMNS}

    def update(self, tokens: TokenChunk) -> None:
        """Takes in at least one token."""
        b, d = tokens.rollout_logprob, tokens.log_ratio
        self.line.update([b, d], tokens.counts, tokens.per_prompt)
        # Log-probs far above 0, which a broken engine can have, overflow; the metrics then say so.
        with np.errstate(over="ignore", invalid="ignore"):
            rest = -np.expm1(b)
            self.tail.update([rest, tokens.abs_log_ratio], tokens.counts, tokens.per_prompt)
            kl = binary_kl(tokens, rest)
            self.binary_kl.update(tokens, ~np.isnan(kl), kl)
        for side, column in ENTROPY_COLUMNS.items():
            if column in tokens.columns:
                entropy = np.asarray(tokens.columns[column], dtype=np.float64)
                self._update_entropies(tokens, side, entropy)

    def _update_entropies(self, tokens: TokenChunk, side: Side, entropy: Floats) -> None:
        known = ~np.isnan(entropy)
        x = (tokens.trainer_logprob if side == "trainer" else tokens.rollout_logprob) + entropy
        self.temperature[side].update(tokens, known, x * tokens.log_ratio, x * x)
        if side == "trainer":
            self.entropy.update(tokens, known, tokens.k3_values, entropy)


def binary_kl(tokens: TokenChunk, rest: Floats) -> Floats:
    """KL between (μ, 1−μ) and (π, 1−π) as μ·k3(d) + (1−μ)·k3(e), e = log((1−π)/(1−μ)), of which no term is below 0.

    Args:
        tokens: The tokens.
        rest: `[n]` 1 − μ.

    Returns:
        `[n]`, NaN where π rounds to 1 or above and μ differs: it has no finite value there. Where μ rounds to 1 or
        above, 1 − μ counts as nothing, which leaves −μ·d.
    """
    d, a, gap = tokens.log_ratio, tokens.trainer_logprob, tokens.prob_diff
    certain = rest <= _LEAST
    undefined = (a >= 0) & (d != 0)
    if certain.any() or undefined.any():
        x = np.where(certain | undefined, 0.0, -gap / np.where(certain, 1.0, rest))
    else:
        x = -gap / rest
    far = np.flatnonzero(x < -_NEAR)
    x[far] = 0.0
    e = np.log1p(x, out=x)
    e[far] = np.log(-np.expm1(a[far]) / rest[far])
    total = rest * scales.k3(e)
    total[certain] = -gap[certain]
    own = tokens.rollout_prob * tokens.k3_values
    huge = np.flatnonzero(tokens.abs_log_ratio > _HUGE)
    own[huge] = gap[huge] - tokens.rollout_prob[huge] * d[huge]
    total += own
    total[undefined] = np.nan
    return total


def sequence_slopes(tokens: TokenChunk) -> Floats:
    """`[s]` least-squares slope of a on b within each sequence; NaN below `SLOPE_TOKENS`, or where b hardly varies."""
    b, d = tokens.rollout_logprob, tokens.log_ratio
    n = np.diff(tokens.start, append=len(tokens))
    mean = tokens.per_sequence(b) / n
    centred = b - np.repeat(mean, n)
    square = tokens.per_sequence(centred * centred)
    varies = (n >= SLOPE_TOKENS) & (square > n * (_ROUNDED * mean) ** 2)
    slopes = np.full(len(n), np.nan)
    slopes[varies] = 1 + tokens.per_sequence(centred * d)[varies] / square[varies]
    return slopes
