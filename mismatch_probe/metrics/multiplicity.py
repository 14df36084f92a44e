"""Levels of tests, and several tests at once."""

from __future__ import annotations

from collections.abc import Sequence

SIGNIFICANCE = 0.05
# At which the smallest detectable effects are given.
POWER = 0.8


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values of a family: rejecting those below α makes any false rejection at most α likely (Holm 1979).

    It holds whatever the dependence between the tests. Tests without a p-value, None, are no part of the family.
    """
    ranked = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p))
        adjusted[index] = largest
    return adjusted
