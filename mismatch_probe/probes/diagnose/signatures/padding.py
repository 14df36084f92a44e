"""Rows that are padded at the left have wrong positions."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level, likeliest
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_BATCHES = (2, 4, 8, 16, 32)
_PADS = (4, 16)


@signature(
    "padding",
    seen_by="pattern",
    kind="forward",
    title="Sequences with short prompts are off, those with the longest are not",
    causes=("left-padding-positions", "left-padding-attended"),
    confirm="Score a padded row alone: the gap vanishes.",
    fix="Give the trainer position ids that count from the first real token: `attention_mask.cumsum(-1) - 1`.",
)
def padding(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise where the prompt is shorter than the longest, of all rows or of a batch of rows."""
    length = evidence.prompt_length
    fits = []
    for rows in (*_BATCHES, len(length)):
        batch = np.arange(len(length)) // rows
        longest = np.zeros(int(batch.max(initial=0)) + 1, np.int64)
        np.maximum.at(longest, batch, length)
        missing = longest[batch] - length
        level = np.where(missing == 0, 0, 1 + np.searchsorted(_PADS, missing, side="right"))
        fits.append(by_level(evidence, state, train, evidence.of_sequence(level), {"rows": float(rows)}, rising=True))
    return likeliest(fits, train)
