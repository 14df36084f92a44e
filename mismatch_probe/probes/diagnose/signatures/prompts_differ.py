"""The two sides read different prompts."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level, likeliest
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_PLACES = (4, 16, 64)
_LEAST = float(np.log(2.5))


@signature(
    "prompts-differ",
    seen_by="pattern",
    kind="rows",
    title="The first tokens of responses are off, or rows of one tag are",
    causes=("missing-bos", "other-system-text", "image"),
    confirm="Compare the prompt ids that each side reads, first and last.",
    fix=(
        "Give the trainer the engine's prompt ids: no second begin-of-sequence token, the same chat template, "
        "images as the engine expands them."
    ),
)
def prompts_differ(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise at the first tokens that fades, in all rows or in those of a tag."""
    place = len(_PLACES) - np.searchsorted(_PLACES, evidence.position, side="right")
    fits = [by_level(evidence, state, train, place, {}, least=_LEAST, rising=True)]
    codes = evidence.rows.get("tags")
    if codes is not None:
        of_token = evidence.of_sequence(codes)
        for code, label in enumerate(evidence.labels.get("tags", ())):
            level = np.where(of_token == code, 1 + place, 0)
            fits.append(by_level(evidence, state, train, level, {"tag": label}, rising=True))
    return likeliest(fits, train)
