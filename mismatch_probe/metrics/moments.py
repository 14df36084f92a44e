"""Per-prompt sums that keep their digits while rows arrive in chunks.

Two things about the rows are known only at the end: their largest exponent, by which sums of exponentials are scaled
down, and their mean, about which squares are summed. Both are provisional here and corrected with every chunk: the
scale as in a streaming log-sum-exp, the centre by the pairwise update of Chan, Golub and LeVeque (1983). Each chunk is
centred on its own mean first, so that what is lost to rounding is small against the spread that the rows do have.

Shape legend: `P` prompts, `J` variables or columns, `n` rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mismatch_probe.metrics.intervals import Floats


class Range:
    """The smallest and the largest of the values seen; `low > high` before the first."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, values: Floats) -> None:
        """Takes in `[n]` values, n ≥ 1."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def scale(self, factor: float) -> None:
        """As if every value so far had been multiplied by `factor` > 0."""
        if self.low <= self.high:
            self.low, self.high = self.low * factor, self.high * factor

    @property
    def varies(self) -> bool:
        """Whether the values differ by more than rounding."""
        largest = max(abs(self.low), abs(self.high))
        return self.high - self.low > 4 * float(np.finfo(np.float64).eps) * largest


class ShiftedSums:
    """Sums of exponentials, `[P, J]`, stored times exp(−shift)."""

    def __init__(self, n_prompts: int, n_columns: int) -> None:
        self.shift = 0.0
        self.sums = np.zeros((n_prompts, n_columns))

    def update(self, sums: Sequence[Floats], shift: float) -> None:
        """Adds J per-prompt sums `[P]` that were stored times exp(−`shift`)."""
        common = max(self.shift, shift)
        self.sums *= math.exp(self.shift - common)
        self.sums += np.stack(sums, axis=1) * math.exp(shift - common)
        self.shift = common


class CentredSums:
    """Sums of variables and of their products about their common means.

    Attributes:
        centre: `[J]` mean of each variable over all rows so far.
        sums: `[P, J]` Σ (x − centre).
        products: `[P, J, J]` Σ (x − centre)(y − centre).
        ranges: J ranges of the variables.
    """

    def __init__(self, n_prompts: int, n_variables: int) -> None:
        self.n = 0
        self.centre = np.zeros(n_variables)
        self.sums = np.zeros((n_prompts, n_variables))
        self.products = np.zeros((n_prompts, n_variables, n_variables))
        self.ranges = [Range() for _ in range(n_variables)]
        self._counts = np.zeros(n_prompts)

    def update(self, variables: Sequence[Floats], counts: Floats, per_prompt: Callable[[Floats], Floats]) -> None:
        """Takes in a chunk.

        Args:
            variables: J arrays `[n]`, n ≥ 1.
            counts: `[P]` rows of each prompt in the chunk.
            per_prompt: Sums `[n]` by prompt, to `[P]`.
        """
        n = len(variables[0])
        centre = np.array([values.mean() for values in variables])
        centred = [values - mean for values, mean in zip(variables, centre, strict=True)]
        sums = np.stack([per_prompt(y) for y in centred], axis=1)
        products = np.empty_like(self.products)
        for j, y in enumerate(centred):
            self.ranges[j].update(variables[j])
            for k, z in enumerate(centred[: j + 1]):
                products[:, j, k] = products[:, k, j] = per_prompt(y * z)
        common = self.centre + (centre - self.centre) * (n / (self.n + n))
        self.sums, self.products = (
            old + new
            for old, new in zip(
                _moved(self.sums, self.products, self._counts, self.centre - common),
                _moved(sums, products, counts, centre - common),
                strict=True,
            )
        )
        self.n, self.centre, self._counts = self.n + n, common, self._counts + counts

    def scale(self, factor: float) -> None:
        """As if every value so far had been multiplied by `factor`."""
        self.centre *= factor
        self.sums *= factor
        self.products *= factor**2
        for seen in self.ranges:
            seen.scale(factor)

    def of(self, *terms: tuple[int, ...]) -> list[Floats]:
        """`[P]` sums of variables `(j,)` and of products `(j, k)`; zero where a variable only varies by rounding."""
        zero = np.zeros(len(self.sums))
        sums = []
        for term in terms:
            values = self.sums[:, term[0]] if len(term) == 1 else self.products[:, term[0], term[1]]
            sums.append(values if all(self.ranges[j].varies for j in term) else zero)
        return sums


def _moved(sums: Floats, products: Floats, counts: Floats, step: Floats) -> tuple[Floats, Floats]:
    """The same sums about a centre that lies `step` `[J]` below the present one."""
    cross = sums[:, :, None] * step
    moved = products + cross + cross.transpose(0, 2, 1) + counts[:, None, None] * np.outer(step, step)
    return sums + counts[:, None] * step, moved
