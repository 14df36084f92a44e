"""Routers of a mixture of experts: whether both sides choose the same experts, and what it costs where they do not.

Shape legend: `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.attribute.rollout import ROUTES
from mismatch_probe.engines.attribute.variants import UNKNOWN
from mismatch_probe.metrics import ladder
from mismatch_probe.probes.attribute.evidence import Evidence, values
from mismatch_probe.probes.attribute.names import FOLLOWED


def expert_rows(evidence: Evidence) -> dict[str, Any] | None:
    """How far the routers of both sides agree, and what their disagreement makes; None for a dense model.

    The gap here is the trainer's to the very prefill whose routes were kept.
    """
    base, parts = evidence.base, evidence.parts
    if not base.context.experts:
        return None
    if base.context.why_no_routes:
        return {"layers": [], "why": base.context.why_no_routes}
    for name, array in ((ROUTES, "routes"), (FOLLOWED, "routes")):
        if name not in parts or array not in parts[name][1]:
            return {"layers": [], "why": evidence.why(name)}
    engine, trainer = parts[ROUTES][1], parts[FOLLOWED][1]
    theirs, ours = np.sort(engine["routes"], 2), np.sort(trainer["routes"], 2)
    # Where two of the engine's experts tie for the last place nobody can say which it took.
    flips = ((theirs != ours).any(2) & (theirs != UNKNOWN).all(2))[:, _predicting_rows(evidence)]
    prefill = np.asarray(engine["logprobs"], np.float64)
    before, after = (np.asarray(trainer[key], np.float64) - prefill for key in ("own", "logprobs"))
    flipped = flips.any(0)
    return {
        "why": "",
        "layers": [
            {"layer": int(layer), "agreement": float(1 - flips[k].mean())}
            for k, layer in enumerate(parts[ROUTES][0]["layers"])
        ],
        "flipped_tokens": float(flipped.mean()),
        "share_of_squares": ladder.share_of_squares(before, flipped, base.tokens, seed=evidence.seed).as_dict(),
        "own_routes": values(ladder.gap(before, base.tokens, seed=evidence.seed)),
        "engine_routes": ladder.change(before, after, base.tokens, seed=evidence.seed).as_dict(),
    }


def _predicting_rows(evidence: Evidence) -> NDArray[np.int64]:
    """`[N]` row, among those of all sequences with their prompts, whose logits predict each response token."""
    rows, start = [], 0
    for sequence in evidence.base.sequences:
        first = start + len(sequence.prompt_token_ids) - 1
        rows.append(np.arange(first, first + len(sequence.response_token_ids)))
        start += sequence.length
    return np.concatenate(rows)
