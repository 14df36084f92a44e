"""Student's t under heavy tails: limits, p-values and detectable effects of an estimate with a standard error; Holm's
adjustment of several tests.

Shape legend: `P` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

SIGNIFICANCE = 0.05
# At which the smallest detectable effects are given.
POWER = 0.8
Floats = NDArray[np.float64]
Interval = tuple[float, float]
Working = Callable[[NDArray[Any]], NDArray[Any]]
UPPER_TAIL = 0.975
# Below this many prompts no test is made: among 2 to 5 prompts 15 to 19 % of tests at 5 % are false alarms (simulated).
TESTED_PROMPTS = 16
# The kurtosis of few heavy-tailed values understates that of their law. Stretching the bootstrap's quantiles by this
# power of what the degrees of freedom do to Student's makes up for it (coverage.py: .93 to .97 at 64 prompts).
_STRETCH_POWER = 2


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


@dataclass(frozen=True)
class Inference:
    """What the prompts say about an estimate, on its working scale.

    Attributes:
        centre: The estimate.
        se: Its linearised cluster standard error.
        degrees: Degrees of freedom of `se`.
        n_prompts: P, those with rows.
        stretch_low: How many times longer than Student's the interval is below the centre, at least 1.
        stretch_high: The same above the centre.
        withheld: Why these prompts support neither limits nor a test; empty where they do.
    """

    centre: float
    se: float
    degrees: float
    n_prompts: int
    stretch_low: float = 1.0
    stretch_high: float = 1.0
    withheld: str = ""

    @property
    def limits(self) -> Interval:
        """95 % limits."""
        half = student(self.degrees) * self.se
        return self.centre - self.stretch_low * half, self.centre + self.stretch_high * half

    def p_value(self, null: float) -> float | None:
        """Two-sided p-value of the working value `null`: below 0.05 exactly where the 95 % limits exclude it.

        None below `TESTED_PROMPTS` prompts, and where the limits are withheld.
        """
        if self.withheld or self.n_prompts < TESTED_PROMPTS:
            return None
        if self.se == 0.0:
            return 1.0 if self.centre == null else 0.0
        stretch = self.stretch_low if self.centre > null else self.stretch_high
        return float(2 * special.stdtr(self.degrees, -abs(self.centre - null) / (stretch * self.se)))

    def detectable(self, power: float) -> float:
        """Smallest distance from a null value that a 5 % test finds with probability `power`, approximately."""
        stretch = max(self.stretch_low, self.stretch_high)
        return self.se * (stretch * student(self.degrees) + float(special.stdtrit(self.degrees, power)))


def student(degrees: float) -> float:
    """97.5 % quantile of Student's t."""
    return float(special.stdtrit(degrees, UPPER_TAIL))


def excess_kurtosis(values: Floats) -> float:
    """Excess kurtosis of the distribution behind the values `[P ≥ 4]`, unbiased for normal ones (G₂ of Fisher 1930)."""
    n = len(values)
    centred = values - values.mean()
    spread = np.abs(centred).max()
    if not spread > 0:
        return 0.0
    centred = centred / spread  # no underflow of fourth powers
    sample = (centred**4).mean() / (centred**2).mean() ** 2 - 3
    return float((n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * sample + 6))


def degrees_of_freedom(kurtosis: float, n_prompts: int) -> float:
    """Of a variance of `n_prompts` values: Var(s²)/σ⁴ = (kurtosis + 2)/P = 2/ν (Satterthwaite 1946), at most P − 1."""
    largest = n_prompts - 1.0
    return largest if kurtosis + 2 <= 0 else min(largest, 2 * n_prompts / (kurtosis + 2))


def heavy_tail_stretch(degrees: float, n_prompts: int) -> float:
    """What the bootstrap's quantiles are multiplied by."""
    return (student(degrees) / student(n_prompts - 1)) ** _STRETCH_POWER
