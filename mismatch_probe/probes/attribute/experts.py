"""Routers of a mixture of experts: whether both sides choose the same experts, and what it costs where they do not.

Shape legend: `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.attribute.rollout import ROUTES
from mismatch_probe.metrics import ladder
from mismatch_probe.probes.attribute.evidence import Evidence, values
from mismatch_probe.probes.attribute.knobs import PREFILL
from mismatch_probe.probes.attribute.measure import FOLLOWED


def expert_rows(evidence: Evidence) -> dict[str, Any] | None:
    """How far the routers of both sides agree, and what their disagreement makes; None for a dense model."""
    base = evidence.base
    if not base.context.experts:
        return None
    if any("failed" in evidence.parts.get(n, ({"failed": ""}, {}))[0] for n in (ROUTES, FOLLOWED)):
        return {
            "layers": [],
            "why": evidence.why(ROUTES if "failed" in evidence.parts.get(ROUTES, ({"failed": 1},))[0] else FOLLOWED),
        }
    followed = evidence.parts[FOLLOWED]
    if "routes" not in followed[1]:
        return {"layers": [], "why": evidence.why(FOLLOWED)}
    theirs, ours = np.sort(evidence.parts[ROUTES][1]["routes"], 2), np.sort(followed[1]["routes"], 2)
    flips = (theirs != ours).any(2)[:, _predicting_rows(evidence)]
    own, prefill = np.asarray(followed[1]["own"], np.float64), evidence.reading(PREFILL)
    if prefill is None:
        return {"layers": [], "why": evidence.why(PREFILL)}
    before, after = own - prefill, np.asarray(followed[1]["logprobs"], np.float64) - prefill
    flipped = flips.any(0)
    return {
        "why": "",
        "layers": [
            {"layer": int(layer), "agreement": float(1 - flips[k].mean())}
            for k, layer in enumerate(evidence.parts[ROUTES][0]["layers"])
        ],
        "flipped_tokens": float(flipped.mean()),
        "share_of_squares": ladder.share_of_squares(before, flipped, base.tokens, seed=evidence.seed).as_dict(),
        "own_routes": values(ladder.gap(before, base.tokens, seed=evidence.seed)),
        "engine_routes": values(ladder.change(before, after, base.tokens, seed=evidence.seed)),
    }


def _predicting_rows(evidence: Evidence) -> NDArray[np.int64]:
    """`[N]` row, among those of all sequences with their prompts, whose logits predict each response token."""
    rows, start = [], 0
    for sequence in evidence.base.sequences:
        first = start + len(sequence.prompt_token_ids) - 1
        rows.append(np.arange(first, first + len(sequence.response_token_ids)))
        start += sequence.length
    return np.concatenate(rows)
