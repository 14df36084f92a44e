"""What metrics are called in reports, from the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mismatch_probe.metrics.catalog import CATALOG

if TYPE_CHECKING:
    from collections.abc import Iterable


def metric_title(key: str) -> str:
    """The metric's title with its unit where it has one, or the key of a metric that the catalogue lacks."""
    info = CATALOG.get(key)
    if info is None:
        return key
    return f"{info.title} ({info.unit})" if info.unit else info.title


def metric_formula(key: str) -> str:
    """The metric's formula, empty for a metric that the catalogue lacks."""
    info = CATALOG.get(key)
    return info.formula if info else ""


def catalog_order(keys: Iterable[str]) -> list[str]:
    """`keys` without repeats in the catalogue's order, unknown ones last."""
    unique = dict.fromkeys(keys)
    return [key for key in CATALOG if key in unique] + [key for key in unique if key not in CATALOG]


FIGURE_GUIDES: dict[str, tuple[str, str]] = {
    "policy": (
        "Token probabilities, and sequences by length",
        "Above, tokens off the dashed diagonal are more likely to one side than to the other; below, a sloping line "
        "means that the log ratio of a sequence drifts with its length.",
    ),
    "ccdf": (
        "How many tokens differ by how much",
        "Read up from a size of |d| to the share of tokens that differ by at least that much; further left is better.",
    ),
    "matrix": (
        "Every rollout dtype with every trainer dtype",
        "Lighter is closer, and a value at its null is as close as an engine is to itself.",
    ),
    "where": (
        "Where the difference sits",
        "Plain rounding is largest at improbable tokens and flat in position; a rise with position has another cause.",
    ),
}
"""Title and one-sentence reading guide of each figure, in the order of a report."""
