"""The prompt of a later turn is not what the engine saw."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature


@signature(
    "later-turns",
    kind="rows",
    title="Turns after the first are off",
    causes=("rewritten-history",),
    confirm="Compare the trainer's ids of the second turn with those that the engine was given.",
    fix=(
        "Keep the ids of earlier turns as the engine saw them; do not render the history again (thinking that is "
        "stripped, templates)."
    ),
)
def later_turns(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise from the second turn on, most right after the seam."""
    turn = evidence.tokens.get("turn")
    if turn is None:
        return None
    known = turn >= 0
    first = np.full(len(evidence.prompt), np.iinfo(np.int64).max)
    np.minimum.at(first, evidence.sequence[known], turn[known])
    later = known & (turn > first[evidence.sequence])
    return by_level(evidence, state, train, np.where(known, later.astype(np.int64), -1), {}, rising=True)
