"""The gap depends on how far a token stands from the first."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, by_level, likeliest
from mismatch_probe.probes.diagnose.evidence import Evidence, Ints, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_FINER, _BETWEEN = 2, 7
_EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@signature(
    "positions",
    seen_by="pattern",
    kind="forward",
    title="The gap sets in, or grows, with the absolute position",
    causes=("rope-long-positions", "bf16-position-ids", "buffers-lost", "rope-scaling", "window-missing"),
    confirm=(
        "Score a long sequence on both sides and look at the gap by position; compare rope_theta, rope_scaling, "
        "sliding_window of both configurations."
    ),
    fix=(
        "Compute position ids and rotary tables in FP32 or integers, and give both sides the same rope_scaling, "
        "sliding_window and rotary buffers."
    ),
)
def positions(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise from an absolute position on, at once or growing."""
    place = evidence.prompt_length[evidence.sequence] + evidence.position
    low, high = (int(one) for one in np.quantile(place, [0.02, 0.98]))
    level = np.searchsorted(np.unique(np.quantile(place, [0.2, 0.4, 0.6, 0.8])), place, side="right")
    growing = by_level(evidence, state, train, level, {"from": float(low)}, rising=True)
    tried: dict[int, Fit | None] = {}
    wanted = {
        *np.quantile(place, [0.15, 0.3, 0.5, 0.7, 0.85]).astype(int).tolist(),
        *(e for e in _EDGES if low < e < high),
    }
    for _ in range(1 + _FINER):
        tried |= {edge: _from(evidence, state, train, place, edge) for edge in sorted(wanted)}
        best = likeliest(tried.values(), train)
        if best is None:
            return growing
        at = next(edge for edge, fit in tried.items() if fit is best)
        below = max((edge for edge in tried if edge < at), default=low)
        above = min((edge for edge in tried if edge > at), default=high)
        wanted = {*np.linspace(below, above, _BETWEEN).astype(int).tolist()} - {low, high} - tried.keys()
    return likeliest([best, growing], train)


def _from(evidence: Evidence, state: State, train: Mask, place: Ints, edge: int) -> Fit | None:
    return by_level(evidence, state, train, (place >= edge).astype(np.int64), {"from": float(edge)}, rising=True)
