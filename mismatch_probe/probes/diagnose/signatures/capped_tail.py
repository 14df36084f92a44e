"""The last tokens of sequences that ran to the length limit are wrong."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level, likeliest
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_LAST = (1, 2, 4, 8)


@signature(
    "capped-tail",
    kind="rows",
    title="The last tokens of sequences that reached the length limit are off",
    causes=("length-capped-tail",),
    confirm="Raise max_tokens: the fault moves to the new end.",
    fix="Mask the last tokens of capped sequences, and update the engine (vLLM 38711).",
)
def capped_tail(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise at the last tokens of capped sequences."""
    capped = evidence.of_sequence(capped_rows(evidence))
    if not capped.any():
        return None
    fits = []
    for last in _LAST:
        level = (capped & (evidence.from_end < last)).astype(np.int64)
        fits.append(by_level(evidence, state, train, level, {"last": float(last)}, rising=True))
    return likeliest(fits, train)


def capped_rows(evidence: Evidence) -> Mask:
    """`[S]` which sequences ended at the limit: by their reason, else those of the greatest length."""
    reasons = evidence.rows.get("finish_reason")
    names = evidence.labels.get("finish_reason", ())
    if reasons is not None and "length" in names:
        return np.asarray(reasons == names.index("length"))
    longest = evidence.length == evidence.length.max(initial=0)
    return longest if longest.sum() > 1 else np.zeros_like(longest)
