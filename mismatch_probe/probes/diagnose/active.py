"""An active diagnosis: recorded ids are scored again under one hypothesis after another, until one explains the gap.

Shape legend: `N` tokens that count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mismatch_probe.config.commands import DiagnoseSettings
from mismatch_probe.ingest.recording import Recording
from mismatch_probe.metrics.hypotheses import Target, size
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.experiments import experiments
from mismatch_probe.probes.diagnose.experiments.base import SIDES, Experiment, Hypothesis, Subject
from mismatch_probe.probes.diagnose.models import Models
from mismatch_probe.probes.diagnose.noise import fit_noise, uncertainty
from mismatch_probe.probes.diagnose.sample import Sample, read_sample
from mismatch_probe.probes.progress import Progress
from mismatch_probe.results import diagnosis as results
from mismatch_probe.results.diagnosis import Active, Cause, NotRun, Side

OFF = 2.0
"""A side is not the plain pass's beyond so many times what rounding makes."""
SUSPECT = 1.15
"""Beyond so many times, experiments are run: with some hundred tokens they settle less than rounding's size."""
SHRUNK, MOST = 3.0, 8.0
"""A hypothesis leaves at most this part of what is beyond rounding, and then all within `OFF`, or this part of all:
a network that computes otherwise also rounds otherwise."""
NEAR, NEARLY = 1.3, 15.0
"""It ends the search where it leaves so many times what rounding makes, or this part of all."""
APART = 2.0
"""Where no hypothesis does so, the nearest is taken if every other cause leaves so many times as much."""
LEAST_GAIN, LEAST_TOTAL = 0.02, 15.0
"""Log-likelihood that it gains, nats a token and in all."""
ROUNDING = 0.03
"""Size that is taken for rounding's where no second dtype can be run."""
_SOME = (0.05, 0.95)
_MOST_LEFT = 2  # causes of a class; of more, none is named that no experiment shows
_FEWEST_SHOWN = 8
_NEIGHBOURS = 32  # of the dump, that may have been in one batch
_DETERMINISTIC = frozenset(
    (
        "end-placeholders",
        "placeholders",
        "missing-values",
        "environment-tokens",
        "retokenised",
        "recomputed",
        "coarse-logprobs",
        "weight-lag",
    )
)
"""Classes that a table settles; a re-score says only whose column it is."""


@dataclass(frozen=True)
class TableClass:
    """A class that signatures found, as far as experiments need it.

    Attributes:
        name, title, fix, causes: Of the signature.
        share: Of tokens that show it.
    """

    name: str
    title: str
    fix: str
    causes: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Accepted:
    """A hypothesis that explains a side."""

    hypothesis: Hypothesis
    experiment: str
    side: Side
    column: Floats
    before: float
    after: float
    gain: float
    share: float = 1.0


def active(
    evidence: Evidence,
    table: Sequence[tuple[TableClass, Mask]],
    recording: Recording,
    settings: DiagnoseSettings,
    progress: Progress,
) -> Active:
    """Scores a part of a dump again, and finds the cause of its gap.

    Args:
        evidence: What signatures were fitted to.
        table: What they found, the one that explains most first, and which of the tokens `[N]` show it.
        recording: The dump.
        settings: Which models, and how many tokens.
        progress: Told what is done.

    Raises:
        ProbeError: A model cannot be found, or cannot score the recorded ids.
    """
    # What gives numbers another meaning gives it to all of them; tokens that show it are not any.
    free = {name for one in experiments().values() if not one.forwards for name in one.classes}
    chosen = bool(table) and table[0][0].name not in free
    shown = table[0][1] if chosen else np.zeros(len(evidence), np.bool_)
    block = _NEIGHBOURS if any(one.name == "padding" for one, _ in table) else 1
    sample = read_sample(recording, evidence, shown, settings.tokens, block)
    with Models(settings, recording, progress) as models:
        return investigate(sample, [one for one, _ in table], models, settings, progress)


def investigate(
    sample: Sample, table: Sequence[TableClass], models: Models, settings: DiagnoseSettings, progress: Progress
) -> Active:
    """Runs experiments, the cheapest first, until one explains the gap.

    Args:
        sample: Recorded sequences.
        table: What signatures found, the one that explains most first.
        models: Makes columns.
        settings: What was asked for.
        progress: Told what is done.
    """
    started = time.perf_counter()
    rows, low = models.plain(sample)
    every, use = _judged(sample, rows.plain, table)
    first = Subject(
        sample=sample,
        rows=rows,
        use=use,
        every=every,
        off=SIDES,
        classes=frozenset(one.name for one in table),
        columns=lambda _, of, changes: models.columns(sample, of, changes, ()),
        vocabulary=models.vocabulary,
        bos=models.bos,
        n_layers=models.n_layers,
        given=models.given,
    )
    rounding = max(size((low - rows.plain)[use]) if low is not None else ROUNDING, 1e-6)
    subject = _rebased(first, rounding)
    sizes = {side: subject.size(side, subject.plain) for side in SIDES}
    floor = max(rounding, least) if (least := min(sizes.values())) <= OFF * rounding else rounding
    suspects = tuple(side for side in SIDES if not sizes[side] <= SUSPECT * floor)
    subject = replace(
        subject,
        off=suspects or SIDES,
        columns=lambda some, of, changes: models.columns(some.sample, of, changes, _targets(some, floor)),
    )
    search = Search(subject, table, floor, progress)
    unseen = bool(table) and sample.shown.any() and (every & sample.shown).sum() < _FEWEST_SHOWN
    cause = search.from_table() if _settled(table) or unseen else search.cause() if suspects else None
    off = tuple(side for side in SIDES if not sizes[side] <= OFF * floor)
    settled: results.Settled = (
        "cause" if cause else "numerics" if search.shared or not off else "side" if len(off) == 1 else "neither-side"
    )
    return Active(
        model=settings.model,
        dtype=settings.trainer_dtype,
        n_tokens=len(sample),
        n_sequences=len(sample.requests),
        n_judged=int(use.sum()),
        floor=floor,
        floor_dtype=models.low_dtype if low is not None else "",
        plain=subject.sizes(subject.plain),
        shared=search.shared,
        ruled_out=tuple(one.name for one in table) if settled == "numerics" else (),
        settled=settled,
        side=cause.side if cause else off[0] if len(off) == 1 and not search.shared else None,
        cause=cause,
        experiments=tuple(search.run),
        left=tuple(search.left),
        seconds=time.perf_counter() - started,
    )


def _judged(sample: Sample, plain: Floats, table: Sequence[TableClass]) -> tuple[Mask, Mask]:
    """`[N]` tokens of steps whose weights are the model's, and of those the ones that show what the table shows."""
    use = np.isfinite(plain)
    steps = sample.step[sample.sequence]
    if len(np.unique(sample.step)) > 1:
        left = {
            int(step): min(size((recorded - plain)[steps == step]) for recorded in (sample.rollout, sample.trainer))
            for step in np.unique(steps)
        }
        use &= np.isin(steps, [step for step, least in left.items() if least <= NEAR * min(left.values())])
    if table and table[0].share < 0.5 and (use & sample.shown).sum() >= _FEWEST_SHOWN:
        return use, use & sample.shown
    return use, use


def _rebased(subject: Subject, rounding: float) -> Subject:
    """The subject with a plain pass at the temperature that both sides record at, if there is one but 1."""
    best = subject
    for one in experiments()["temperature"].run(subject):
        assert one.column is not None
        other = replace(subject, rows=subject.rows.at_temperature(float(one.parameters["temperature"])))
        sizes = [other.size(side, other.plain) for side in SIDES]
        halved = all(size < best.size(side, best.plain) / 2 for side, size in zip(SIDES, sizes, strict=True))
        best = other if halved and min(sizes) <= OFF * rounding else best
    return best


def _targets(subject: Subject, floor: float) -> list[Target]:
    """What ends a job: a side that the plain pass does not reproduce, to within rounding."""
    most = {side: max(NEAR * floor, subject.size(side, subject.plain) / NEARLY) for side in subject.off}
    return [Target(subject.recorded(side), subject.use, most[side]) for side in subject.off]


def _settled(table: Sequence[TableClass]) -> bool:
    """Whether the dump itself settles the first class."""
    return bool(table) and table[0].name in _DETERMINISTIC


class Search:
    """Goes through experiments, until one explains the gap.

    Args:
        subject: What they work on.
        table: What signatures found.
        floor: Size that rounding makes.
        progress: Told what is done.

    Attributes:
        run: What was run.
        left: What was not.
        shared: What both sides have and the plain pass has not; empty for nothing.
    """

    def __init__(self, subject: Subject, table: Sequence[TableClass], floor: float, progress: Progress) -> None:
        self._subject, self._table, self._floor, self._progress = subject, table, floor, progress
        self._ruled_out: set[str] = set()
        self._near: list[Accepted] = []
        self.run: list[results.Experiment] = []
        self.left: list[NotRun] = []
        self.shared = ""

    def cause(self) -> Cause | None:
        """What explains the gap; None where nothing does."""
        subject, first = self._subject, self._table[0] if self._table else None
        known = list(experiments().values())
        # A class that no experiment is of is told by a key: other numbers near a side's say nothing against it.
        alone = first is not None and not any(first.name in one.classes for one in known)
        accepted = [] if alone else [found for one in known if not one.forwards for found in self._made(one)]
        both = [one for one in accepted if all(self._explains(side, one.column) for side in SIDES)]
        if both:
            self.shared = both[0].hypothesis.about
            return None
        # What gives all numbers another meaning is the cause, unless a network does it better that looks alike.
        labels = bool(accepted)
        alike = {name for one in known if one.name in {a.experiment for a in accepted} for name in one.classes}
        for one in sorted((one for one in known if one.forwards), key=self._order):
            missing = [name for name in one.needs if name not in subject.given]
            other = labels and not alike & set(one.classes)
            if missing or alone or other or any(self._ends(found) for found in accepted):
                self.left.append(NotRun(name=one.name, forwards=one.forwards, needs=_options(missing)))
                continue
            self._progress.message(f"experiment: {one.name}")
            accepted += self._made(one)
        accepted = accepted or self._nearest()
        return self._best(accepted) if accepted else self.from_table()

    def _nearest(self) -> list[Accepted]:
        """The hypothesis that leaves least, where it leaves little and every other cause leaves much more."""
        best = min(self._near, key=lambda one: one.after, default=None)
        if best is None or best.after - self._floor > (best.before - self._floor) / SHRUNK:
            return []
        others = (one for one in self._near if one.side == best.side and one.hypothesis.cause != best.hypothesis.cause)
        if any(one.after < APART * best.after for one in others):
            return []
        return [replace(best, gain=_gain(self._subject, best.side, best.column))]

    def _order(self, one: Experiment) -> tuple[bool, bool, int]:
        """What the user brought, then those of the table's classes, then the cheapest."""
        return not one.needs or one.forwards > 20, not self._subject.classes & set(one.classes), one.forwards

    def _ends(self, one: Accepted) -> bool:
        return one.after <= max(NEAR * self._floor, one.before / NEARLY)

    def _made(self, one: Experiment) -> list[Accepted]:
        """An experiment's hypotheses, noted, and those that explain a side."""
        found = []
        for hypothesis in one.run(self._subject):
            sides = list(self._explained(hypothesis, one.name))
            found += sides
            column, cause = hypothesis.column, hypothesis.cause
            sizes = hypothesis.sizes if column is None else self._subject.sizes(column)
            if sizes is not None and cause is not None and not sides:
                self._ruled_out.add(cause.name)
            self.run.append(
                results.Experiment(
                    name=one.name,
                    hypothesis=hypothesis.about,
                    parameters=dict(hypothesis.parameters),
                    forwards=hypothesis.forwards,
                    seconds=hypothesis.seconds,
                    sizes=sizes,
                    explains=tuple(accepted.side for accepted in sides),
                    why=hypothesis.why,
                )
            )
        return found

    def _explained(self, hypothesis: Hypothesis, name: str) -> Iterator[Accepted]:
        """Sides that a hypothesis explains, in all sequences or in some."""
        subject, whole = self._subject, hypothesis.column
        if hypothesis.cause is None or (whole is None and not hypothesis.like):
            return
        for side in subject.off if hypothesis.only is None else (hypothesis.only,):
            if side not in subject.off:
                continue
            before = subject.size(side, subject.plain)
            if hypothesis.like:
                if before > OFF * self._floor and subject.off == (side,):
                    yield Accepted(hypothesis, name, side, subject.plain, before, before, 0.0)
                continue
            assert whole is not None
            for column, share in ((whole, 1.0), subject.mixed(side, whole)):
                if self._explains(side, column) and (share == 1 or _SOME[0] <= share <= _SOME[1]):
                    after, gain = subject.size(side, column), _gain(subject, side, column)
                    if gain >= LEAST_GAIN * subject.use.mean() and gain * subject.every.sum() >= LEAST_TOTAL:
                        yield Accepted(hypothesis, name, side, column, before, after, gain, share)
                        break
            else:
                self._near.append(Accepted(hypothesis, name, side, whole, before, subject.size(side, whole), 0.0))

    def _explains(self, side: Side, column: Floats) -> bool:
        before, after = self._subject.size(side, self._subject.plain), self._subject.size(side, column)
        fits = after <= OFF * self._floor and after - self._floor <= (before - self._floor) / SHRUNK
        return before > SUSPECT * self._floor and (fits or after <= before / MOST)

    def _best(self, accepted: Sequence[Accepted]) -> Cause:
        """The hypothesis that gains most, with those whose columns are the same within rounding.

        Where each side has one, a temperature is that of sampling, and the other side is at fault.
        """
        others = [one for one in accepted if one.experiment != "temperature"]
        accepted = others if others and len({one.side for one in accepted}) > 1 else accepted
        best = max(accepted, key=lambda one: one.gain)
        cause = best.hypothesis.cause
        assert cause is not None
        same = [
            one.hypothesis.cause.name
            for one in accepted
            if one.hypothesis.cause is not None
            and one.side == best.side
            and size((one.column - best.column)[self._subject.every]) <= max(self._floor, 1e-4) / 2
        ]
        shares: dict[str, float | str] = {} if best.share == 1 else {"share_of_sequences": best.share}
        return Cause(
            name=cause.name,
            side=cause.side or best.side,
            title=cause.title,
            fix=cause.fix,
            experiment=best.experiment,
            parameters=dict(best.hypothesis.parameters) | shares,
            before=best.before,
            after=best.after,
            floor=self._floor,
            gain=best.gain,
            as_well=tuple(name for name in dict.fromkeys((*cause.also, *same)) if name != cause.name),
        )

    def from_table(self) -> Cause | None:
        """A cause of the table's first class that no experiment ruled out; the plain pass tells the side."""
        if not self._table:
            return None
        found = self._table[0]
        left = [name for name in found.causes if name not in self._ruled_out]
        if not 1 <= len(left) <= _MOST_LEFT:
            return None
        subject = self._subject
        broken = [side for side in SIDES if not np.isfinite(subject.recorded(side)[subject.use]).all()]
        sides = broken if len(broken) == 1 else subject.off
        side = sides[0] if len(sides) == 1 else None
        before = max(subject.size(side, subject.plain) for side in sides)
        return Cause(
            name=left[0],
            side=side,
            title=found.title,
            fix=found.fix,
            experiment="plain",
            parameters={},
            before=before,
            after=before,
            floor=self._floor,
            gain=0.0,
            as_well=tuple(left[1:]),
        )


def _options(missing: Sequence[str]) -> str:
    names = {
        "older": "--older-checkpoint",
        "base": "--base-model",
        "adapter": "--adapter",
        "engine": "--engine-dtype",
    }
    return ", ".join(names[one] for one in missing)


def _gain(subject: Subject, side: Side, column: Floats) -> float:
    """Log-likelihood of a side's tokens under a column and noise, less that under the plain pass, nats a token."""
    x = uncertainty(subject.plain[subject.every])
    totals = []
    for expected in (subject.plain, column):
        rest = np.nan_to_num((subject.recorded(side) - expected)[subject.every], nan=30.0, posinf=30.0, neginf=-30.0)
        totals.append(float(fit_noise(rest, x).log_density(rest, x).mean()))
    return totals[1] - totals[0]
