"""Sequences of a packed row see each other."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_PLACES = (8, 32)


@signature(
    "packing",
    kind="forward",
    title="Sequences that are not the first of their pack are off",
    causes=("packing-leak",),
    confirm="Score the packed sequences one by one: the gap vanishes.",
    fix=(
        "Reset position ids and attention at each sequence of a pack (`cu_seqlens` of a variable-length attention "
        "kernel), or switch packing off."
    ),
)
def packing(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise from the second sequence of a pack on, most at its first tokens."""
    index = evidence.rows.get("pack_index")
    if index is None:
        return None
    later = evidence.of_sequence(index) > 0
    place = np.searchsorted(_PLACES, evidence.position, side="right")
    level = np.where(later, len(_PLACES) + 1 - place, 0)
    return by_level(evidence, state, train, level, {}, rising=True)
