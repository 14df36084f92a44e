"""Which of a class's causes it is, where the dump itself says so: no model is needed.

Shape legend: `N` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mismatch_probe.metrics.chunks import WEIGHT_VERSION
from mismatch_probe.probes.diagnose.evidence import Evidence, Ints, Mask

_MOST = 0.5
_CERTAIN = -0.1  # nats
_RUN = 4  # tokens of a tool's text that stand together

Reading = Callable[[Evidence, Mask], tuple[str, ...]]


def read_causes(name: str, causes: tuple[str, ...], evidence: Evidence, shown: Mask) -> tuple[str, ...]:
    """A class's causes, the one that the dump shows first or alone.

    Args:
        name: The class.
        causes: That it can have.
        evidence: The table.
        shown: `[N]` tokens that show it.
    """
    reading = _READINGS.get(name)
    return reading(evidence, shown) if reading is not None and shown.any() else causes


def _runs(evidence: Evidence, shown: Mask) -> Ints:
    """Lengths of runs of tokens that show a class, within sequences."""
    begins = np.r_[True, ~shown[:-1] | (evidence.sequence[1:] != evidence.sequence[:-1])] & shown
    return np.asarray(np.bincount(np.cumsum(begins)[shown] - 1))


def _end(evidence: Evidence, shown: Mask) -> tuple[str, ...]:
    return ("padding-counted",) if np.mean(_runs(evidence, shown) > 1) > _MOST else ("eos-placeholder",)


def _inside(evidence: Evidence, shown: Mask) -> tuple[str, ...]:
    return ("tool-tokens-zero",) if np.median(_runs(evidence, shown)) >= _RUN else ("missing-logprobs",)


def _missing(evidence: Evidence, shown: Mask) -> tuple[str, ...]:
    """At the last token alone, where the other side is certain, or from one token to the end."""
    if (evidence.from_end[shown] == 0).all():
        return ("eos-placeholder",)
    others = np.where(np.isfinite(evidence.trainer), evidence.trainer, evidence.rollout)[shown]
    if np.nanmedian(others) > _CERTAIN:
        return ("missing-at-certain-tokens",)
    to_end = np.bincount(evidence.sequence[shown & (evidence.from_end == 0)], minlength=len(evidence.prompt)) > 0
    runs = np.bincount(evidence.sequence[shown], minlength=len(evidence.prompt)) > 0
    return ("nan-row",) if np.mean(to_end[runs]) > _MOST else ("missing-at-certain-tokens",)


def _lag(evidence: Evidence, _: Mask) -> tuple[str, ...]:
    version = np.asarray(evidence.tokens[WEIGHT_VERSION], np.float64)
    inside = evidence.sequence[1:] == evidence.sequence[:-1]
    switched = np.unique(evidence.sequence[1:][inside & (version[1:] != version[:-1])])
    many = len(switched) > _MOST * len(evidence.prompt)
    return ("switch-within-response",) if many else ("async-staleness",)


def _coarse(evidence: Evidence, _: Mask) -> tuple[str, ...]:
    """Steps of logits come from a 16-bit softmax, decimals from a file; values in 16 bit at the trainer from either."""
    grid = evidence.grid
    assert grid is not None  # it is what made the class
    if grid.text("grid") == "logits":
        return ("softmax-16-bit",)
    if grid.text("grid") == "decimals" or grid.where == "rollout":
        return ("rounded-storage",)
    return ("softmax-16-bit", "rounded-storage")


_READINGS: dict[str, Reading] = {
    "end-placeholders": _end,
    "placeholders": _inside,
    "missing-values": _missing,
    "weight-lag": _lag,
    "coarse-logprobs": _coarse,
}
