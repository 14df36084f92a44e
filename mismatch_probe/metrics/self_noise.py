"""Self-noise: how far one engine is from itself over the same requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mismatch_probe.metrics.chunks import Ints, usable
from mismatch_probe.metrics.intervals import Floats


@dataclass(frozen=True)
class SelfNoise:
    """How far an engine is from itself.

    Attributes:
        n_tokens: Tokens of the common prefixes.
        n_sequences: Sequences that both passes have.
        n_diverged_sequences: Sequences whose ids differ within the shared length.
        mean_abs_logprob_diff: Over the usable tokens of the common prefixes, nats; None without any.
        max_abs_logprob_diff: Likewise.
        n_nonfinite: Tokens of the common prefixes that are non-finite on either side.
        n_excluded: Those, and the ones that are otherwise unusable: left out of both figures.
    """

    n_tokens: int
    n_sequences: int
    n_diverged_sequences: int
    mean_abs_logprob_diff: float | None
    max_abs_logprob_diff: float | None
    n_nonfinite: int
    n_excluded: int


def self_noise(
    first_ids: Ints, first_logprobs: Floats, second_ids: Ints, second_logprobs: Floats, sequence: Ints
) -> SelfNoise:
    """Compare two passes of one engine, up to the first differing token of each sequence.

    After that token the two passes condition on different text, so a comparison would not be of the engine.

    Args:
        first_ids: `[N]` token ids of the first pass, aligned with the second by sequence and position.
        first_logprobs: `[N]` its log-probs, nats.
        second_ids: `[N]`
        second_logprobs: `[N]`
        sequence: `[N]` index of each token's sequence, non-decreasing.
    """
    starts_sequence = np.diff(sequence, prepend=-1) != 0
    starts, row = np.flatnonzero(starts_sequence), np.cumsum(starts_sequence) - 1
    differs = first_ids != second_ids
    seen = np.cumsum(differs)
    common = seen == (seen - differs)[starts][row]
    finite = common & np.isfinite(first_logprobs) & np.isfinite(second_logprobs)
    kept = finite & usable(first_logprobs, second_logprobs)
    abs_diff = np.abs(first_logprobs[kept].astype(np.float64) - second_logprobs[kept].astype(np.float64))
    return SelfNoise(
        n_tokens=int(common.sum()),
        n_sequences=len(starts),
        n_diverged_sequences=len(np.unique(row[differs])),
        mean_abs_logprob_diff=float(abs_diff.mean()) if len(abs_diff) else None,
        max_abs_logprob_diff=float(abs_diff.max()) if len(abs_diff) else None,
        n_nonfinite=int(common.sum() - finite.sum()),
        n_excluded=int(common.sum() - kept.sum()),
    )
