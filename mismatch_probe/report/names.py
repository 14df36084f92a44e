"""What metrics, properties of tokens, and figures are called in reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable


def metric_title(key: str) -> str:
    """The metric's title with its unit where it has one, or the key of a metric that is not in the catalogue."""
    info = CATALOG.get(key)
    if info is None:
        return key
    return f"{info.title} ({info.unit})" if info.unit else info.title


def metric_formula(key: str) -> str:
    """The metric's formula, empty for a metric that is not in the catalogue."""
    info = CATALOG.get(key)
    return info.formula if info else ""


def catalog_order(keys: Iterable[str]) -> list[str]:
    """`keys` without repeats in the catalogue's order, unknown ones last."""
    unique = dict.fromkeys(keys)
    return [key for key in CATALOG if key in unique] + [key for key in unique if key not in CATALOG]


WHERE_TITLES = {
    "probability": "rollout probability μ(token)",
    "entropy": "entropy of the trainer (nats)",
    "rank": "rank at the trainer (0 = likeliest)",
    "token_kind": "kind of token",
    "position": "position in the response",
}
"""What a token is sorted by: keys of a comparison's `where`, with the words for an axis or a table."""


def bin_order(labels: Iterable[str]) -> list[str]:
    """Bins without repeats in the order of their lower limits, or of the kinds of token."""

    def place(label: str) -> float:
        if label in KINDS:
            return KINDS.index(label)
        try:
            return float(label.removeprefix("≥ ").split("–")[0])
        except ValueError:
            return float("inf")

    return sorted(dict.fromkeys(labels), key=place)
