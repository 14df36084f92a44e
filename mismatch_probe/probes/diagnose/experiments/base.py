"""What an experiment is, and what it works on.

Shape legend: `N` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.metrics.hypotheses import CAP, Rows, fitted, sampled_at, size
from mismatch_probe.probes.diagnose.evidence import Floats, Mask
from mismatch_probe.probes.diagnose.sample import Sample
from mismatch_probe.results.diagnosis import Side, SideSizes

SIDES: tuple[Side, ...] = ("rollout", "trainer")
_ROUNDS, _FINALISTS = 6, 2
_PART = 500  # tokens of a pass that shows whether a change is worth more
_WORTH, _ENDS = 0.88, 0.05
Columns = Callable[["Subject", str, Sequence[ForwardChange]], Iterator[tuple[ForwardChange, Floats | None, str, float]]]
"""Makes columns on one of the given models, which stops at the first that is what a side recorded. Of each change its
column `[N]`, or why there is none, and seconds."""
Made = Iterator["Hypothesis"]
CauseOf = Callable[[ForwardChange], "Named | None"]


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
        column: `[N]` nats; None where there is none, or one of a part of the tokens.
        parameters: What was fitted or chosen.
        forwards: Forward passes that it took.
        seconds: What they took.
        why: Why there is no column.
        only: The side that it can be true of; None for both.
        like: Instead of being near to the column: the side is as far from the plain pass as random columns are.
        sizes: What a column of a part of the tokens leaves.
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
    sizes: SideSizes | None = None


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
        given: What else there is: `older`, `base`, `adapter`, `engine`.
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

    @cached_property
    def part(self) -> Subject:
        """So many sequences as show whether a forward pass is worth its cost; all of it where it is small."""
        sample, used, index = self.sample, 0, []
        shows = np.bincount(sample.sequence[self.use], minlength=len(sample.requests))
        for i in np.argsort(-shows, kind="stable").tolist():
            if used and used + sample.requests[i].length > _PART:
                continue
            used += sample.requests[i].length
            index.append(i)
        if used * 2 > sample.n_forward:
            return self
        index.sort()
        kept = np.isin(sample.sequence, index)
        rows = replace(self.rows, logprob=self.plain[kept], temperature=1.0)
        return replace(self, sample=sample.part(index), rows=rows, use=self.use[kept], every=self.every[kept])

    def sizes(self, column: Floats) -> SideSizes:
        """What a column leaves of both sides."""
        return SideSizes(rollout=self.size("rollout", column), trainer=self.size("trainer", column))

    def forward(self, of: str, changes: Sequence[ForwardChange], cause: CauseOf) -> Made:
        """Hypotheses of changes of a forward pass: all on a part, then the best ones on all tokens."""
        left: dict[ForwardChange, float] = {}
        yield from self.screened(of, changes, cause, left)
        yield from self.best(of, left, cause)

    def whole(self, of: str, changes: Sequence[ForwardChange], cause: CauseOf) -> Made:
        """The same on all tokens at once, for what depends on which sequences there are."""
        for change, column, why, seconds in self.columns(self, of, changes):
            yield Hypothesis(change.name, cause(change), column, {}, 1, seconds, why)

    def scan(
        self,
        change: Callable[[float], ForwardChange],
        grid: Sequence[float],
        cause: Named,
        *,
        of: str = "model",
        integer: bool = False,
    ) -> Made:
        """Hypotheses of a change by a number: a grid, then `_ROUNDS` times the middles beside the best one so far.

        Args:
            change: Of a number, which it keeps as its value.
            grid: Increasing positive numbers.
            cause: What is wrong where it is so.
            of: The model.
            integer: Whether the number is one.
        """
        left: dict[ForwardChange, float] = {}
        wanted = list(grid)
        for _ in range(_ROUNDS + 1):
            yield from self.screened(of, [change(value) for value in wanted], lambda _: cause, left)
            if not left or ((best := min(left, key=left.__getitem__)) and left[best] > _WORTH):
                return
            known = sorted({*grid, *(one.value for one in left)})
            at = known.index(best.value)
            middles = [float(np.sqrt(best.value * known[i])) for i in (at - 1, at + 1) if 0 <= i < len(known)]
            wanted = [m for m in ([float(round(m)) for m in middles] if integer else middles) if m not in known]
            if not wanted or left[best] <= _ENDS:
                break
        yield from self.best(of, left, lambda _: cause)

    def screened(
        self,
        of: str,
        changes: Sequence[ForwardChange],
        cause: CauseOf,
        left: dict[ForwardChange, float],
    ) -> Made:
        """Hypotheses on a part; `left` gets the part of a side's size that each leaves, the least of sides."""
        part = self.part
        plain = {side: part.size(side, part.plain) for side in self.off}
        for change, column, why, seconds in part.columns(part, of, changes):
            sizes = None if column is None else part.sizes(column)
            if column is not None:
                left[change] = min(part.size(side, column) / max(plain[side], 1e-12) for side in self.off)
            kept = column if part is self else None
            yield Hypothesis(change.name, cause(change), kept, {}, 1, seconds, why, sizes=sizes)

    def best(self, of: str, left: Mapping[ForwardChange, float], cause: CauseOf) -> Made:
        """Hypotheses on all tokens: those that left least of a part."""
        best = sorted((one for one in left if left[one] <= _WORTH), key=left.__getitem__)[:_FINALISTS]
        if self.part is not self and best:
            for one in self.whole(of, best, cause):
                yield replace(one, about=f"{one.about}, all tokens")

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


Run = Callable[[Subject], Made]


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: In kebab case.
        classes: Classes of the table for which it comes first.
        forwards: Forward passes that it costs, at most; 0 where the plain pass's rows are enough.
        needs: What else it needs, of `older`, `base`, `adapter`, `engine`.
        run: Makes its hypotheses.
    """

    name: str
    classes: tuple[str, ...]
    forwards: int
    needs: tuple[str, ...]
    run: Run
