"""Where on the distribution the gap lies: |d| and its contribution to Σ d² by what is known of a token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mismatch_probe.metrics import curves
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.binned import BinnedSums
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.metrics.kinds import KINDS

ENTROPY_EDGES = np.array([0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 6.0, np.inf])
RANK_EDGES = np.array([0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0, np.inf])
KIND_EDGES: Floats = np.arange(len(KINDS) + 1, dtype=np.float64)
# Columns of a pair that are binned, in addition to its own probability and position.
COLUMN_EDGES: dict[str, Floats] = {"entropy": ENTROPY_EDGES, "rank": RANK_EDGES, "token_kind": KIND_EDGES}


@dataclass(frozen=True)
class WhereBin:
    """A bin of a token property.

    Attributes:
        label: E.g. `"0.01–0.03"` or `"digit"`.
        n_tokens: Tokens in it.
        fraction_of_tokens: Of all tokens whose property is known.
        contribution: Its part of Σ d².
        mean_abs: Mean |d|, nats, with its 95 % interval over prompts; limits are None where there is none.
        ci_low: Lower limit.
        ci_high: Upper limit.
    """

    label: str
    n_tokens: int
    fraction_of_tokens: float
    contribution: float
    mean_abs: float
    ci_low: float | None
    ci_high: float | None


def where(sums: PairSums) -> dict[str, list[WhereBin]]:
    """Bins by `probability` (of the rollout), `entropy` and `rank` (by the trainer), `position` and `token_kind`.

    A property that no token of the pair carries is left out, and so are empty bins.
    """
    by = {"probability": sums.binned["probability"], "position": curves.position_bins(sums)}
    by |= {name: sums.binned[name] for name in COLUMN_EDGES if name in sums.binned}
    order = ("probability", "entropy", "rank", "position", "token_kind")
    return {name: _bins(name, by[name]) for name in order if name in by and by[name].count.any()}


def _bins(name: str, sums: BinnedSums) -> list[WhereBin]:
    diff = curves.binned_diff(sums)
    square, count = sums.squared_log_ratio.sum(axis=0), sums.count.sum(axis=0)
    kept = np.flatnonzero(count)
    total = float(square.sum())
    return [
        WhereBin(
            label=_label(name, float(diff.left[i]), float(diff.right[i])),
            n_tokens=int(count[k]),
            fraction_of_tokens=float(count[k] / count.sum()),
            contribution=float(square[k] / total) if total > 0 else 0.0,
            mean_abs=float(diff.mean_abs[i]),
            ci_low=_or_none(float(diff.ci_low[i])),
            ci_high=_or_none(float(diff.ci_high[i])),
        )
        for i, k in enumerate(kept)
    ]


def _label(name: str, low: float, high: float) -> str:
    if name == "token_kind":
        return KINDS[int(low)]
    if name in ("rank", "position"):
        last = high - 1
        return f"{low:.0f}" if last == low else f"≥ {low:.0f}" if np.isinf(high) else f"{low:.0f}–{last:.0f}"
    return f"≥ {low:g}" if np.isinf(high) else f"{low:g}–{high:g}"


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
