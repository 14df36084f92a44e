"""What an experiment is, and what it works on.

Shape legend: `N` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.metrics.hypotheses import CAP, Rows, fitted, sampled_at, size
from mismatch_probe.probes.diagnose.evidence import Floats, Mask
from mismatch_probe.probes.diagnose.sample import Sample
from mismatch_probe.results.diagnosis import Side

SIDES: tuple[Side, ...] = ("rollout", "trainer")
_ROUNDS = 6
Made = Iterator[tuple[ForwardChange, Floats | None, str, float]]
"""Of each change its column `[N]`, or why there is none, and seconds."""
Columns = Callable[[str, Sequence[ForwardChange]], Made]
"""Makes columns on one of the given models, which stops at the first that is what a side recorded."""


@dataclass(frozen=True)
class Named:
    """A cause as a reader is told of it.

    Attributes:
        name: In kebab case.
        title: What is wrong, a sentence without its stop.
        fix: What to do.
        side: The side at fault; None for the one whose log-probs are not the plain pass's.
        also: Causes that it cannot be told from.
    """

    name: str
    title: str
    fix: str
    side: Side | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A column of log-probs.

    Attributes:
        about: What is supposed, in a few words.
        cause: What is wrong where it is so; None where it is only looked at.
        column: `[N]` nats; None where there is none.
        parameters: What was fitted or chosen.
        forwards: Forward passes that it took.
        seconds: What they took.
        why: Why there is no column.
        only: The side that it can be true of; None for both.
        like: Instead of being near to the column: the side is as far from the plain pass as random columns are.
    """

    about: str
    cause: Named | None
    column: Floats | None
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    forwards: int = 0
    seconds: float = 0.0
    why: str = ""
    only: Side | None = None
    like: bool = False


@dataclass(frozen=True)
class Subject:
    """What experiments work on.

    Attributes:
        sample: The sequences.
        rows: What the plain pass left of its rows of logits.
        use: `[N]` tokens that sizes are of.
        every: `[N]` these and others of the same steps, that parameters are fitted to.
        off: Sides that the plain pass does not reproduce; both, where it is not known.
        classes: What the table's signatures found.
        columns: Makes further columns.
        vocabulary: Ids of the model.
        bos: Id that begins a sequence; None where the model has none.
        n_layers: Decoder layers.
        given: Which other weights there are: `older`, `base`, `adapter`.
        enough: Size at which a hypothesis explains a side as well as rounding allows.
    """

    sample: Sample
    rows: Rows
    use: Mask
    every: Mask
    off: tuple[Side, ...]
    classes: frozenset[str]
    columns: Columns
    vocabulary: int
    bos: int | None
    n_layers: int
    given: frozenset[str]
    enough: float = 0.0

    @property
    def plain(self) -> Floats:
        """`[N]` log-probs of the plain pass."""
        return self.rows.plain

    def recorded(self, side: Side) -> Floats:
        """`[N]` what a side recorded."""
        return self.sample.rollout if side == "rollout" else self.sample.trainer

    def size(self, side: Side, column: Floats) -> float:
        """What a column leaves of a side."""
        return size((self.recorded(side) - column)[self.use])

    def from_plain(self, column: Floats) -> float:
        """How far a column is from the plain pass."""
        return size((column - self.plain)[self.use])

    def mixed(self, side: Side, column: Floats) -> tuple[Floats, float]:
        """A column `[N]` in sequences that it is far nearer to, the plain one elsewhere; and their share of all."""
        index, n = self.sample.sequence, len(self.sample.requests)
        losses = []
        for expected in (column, self.plain):
            rest = np.nan_to_num(np.abs(self.recorded(side) - expected), nan=CAP)
            losses.append(np.bincount(index[self.use], np.minimum(rest, CAP)[self.use], n))
        nearer = losses[0] < losses[1] / 2
        judged = np.bincount(index[self.use], minlength=n) > 0
        return np.where(nearer[index], column, self.plain), float(nearer[judged].mean())

    @cached_property
    def sampled_at(self) -> float:
        """The temperature at which the ids were sampled, by maximum likelihood."""
        return sampled_at(self.rows)

    def forward(
        self, of: str, changes: Sequence[ForwardChange], cause: Callable[[ForwardChange], Named | None]
    ) -> Iterator[Hypothesis]:
        """Hypotheses of changes of a forward pass."""
        for change, column, why, seconds in self.columns(of, changes):
            yield Hypothesis(change.name, cause(change), column, {}, 1, seconds, why)

    def scan(
        self,
        change: Callable[[float], ForwardChange],
        grid: Sequence[float],
        cause: Named,
        *,
        of: str = "model",
        whole: bool = False,
    ) -> Iterator[Hypothesis]:
        """Hypotheses of a change by a number: a grid, then `_ROUNDS` times the middles beside the best one so far.

        Args:
            change: Of a number.
            grid: Increasing positive numbers.
            cause: What is wrong where it is so.
            of: The model.
            whole: Whether the number is an integer.
        """
        found: dict[float, float] = {}
        wanted = list(grid)
        for round_ in range(_ROUNDS + 1):
            values = {change(value).name: value for value in wanted}
            for one in self.forward(of, [change(value) for value in wanted], lambda _: cause):
                if one.column is not None:
                    found[values[one.about]] = min(self.size(side, one.column) for side in self.off)
                yield one
            if not found or ((best := min(found, key=found.__getitem__)) and found[best] > self.worth):
                return
            known = sorted({*found, *grid})
            at = known.index(best)
            beside = [known[i] for i in (at - 1, at + 1) if 0 <= i < len(known)]
            middles = [float(np.sqrt(best * other)) for other in beside]
            wanted = [m for m in ([float(round(m)) for m in middles] if whole else middles) if m not in found]
            if not wanted or found[best] <= self.enough or round_ == _ROUNDS:
                return

    @property
    def worth(self) -> float:
        """Size above which a hypothesis is not looked at more closely: it hardly explains anything."""
        return 0.85 * min(self.size(side, self.plain) for side in self.off)

    def fit(
        self, side: Side, column: Callable[[float], Floats], grid: Sequence[float], tolerance: float
    ) -> tuple[float, Floats] | None:
        """The parameter whose column is nearest to a side, and that column `[N]`; None where the side has no tokens.

        Args:
            side: The side.
            column: `[N]` of a parameter.
            grid, tolerance: As in `metrics.hypotheses.fitted`.
        """
        use = self.among(side)
        if not use.any():
            return None
        value = fitted(lambda x: column(x)[use], self.recorded(side)[use], grid, tolerance)
        return value, column(value)

    def among(self, side: Side) -> Mask:
        """`[N]` finite tokens."""
        return np.asarray(self.every & np.isfinite(self.recorded(side)))


Run = Callable[[Subject], Iterator[Hypothesis]]


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: In kebab case.
        classes: Classes of the table for which it comes first.
        forwards: Forward passes that it costs, at most; 0 where the plain pass's rows are enough.
        needs: Other weights that it needs, of `older`, `base`, `adapter`.
        run: Makes its hypotheses.
    """

    name: str
    classes: tuple[str, ...]
    forwards: int
    needs: tuple[str, ...]
    run: Run
