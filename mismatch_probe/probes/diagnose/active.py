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
from mismatch_probe.results.diagnosis import Active, Cause, NotRun, Side, SideSizes

OFF = 2.0
"""A side is not the plain pass's beyond so many times what rounding makes."""
SHRUNK = 3.0
"""A hypothesis leaves at most this part of what the plain pass leaves, of all of it or of what is beyond rounding."""
LEAST_GAIN, LEAST_TOTAL = 0.02, 15.0
"""Log-likelihood that it gains, nats a token and in all."""
ROUNDING = 0.03
"""Size that is taken for rounding's where no second dtype can be run."""
_BEYOND = 1.2
_FEWEST_SHOWN = 8
_NEIGHBOURS = 32  # of the dump, that may have been in one batch
_DETERMINISTIC = frozenset(
    ("end-placeholders", "placeholders", "missing-values", "environment-tokens", "retokenised", "recomputed")
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
    before: float
    after: float
    gain: float


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
    shown = table[0][1] if table else np.zeros(len(evidence), np.bool_)
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
    use = _judged(sample, rows.plain, size(low - rows.plain) if low is not None else ROUNDING, table)
    first = Subject(
        sample=sample,
        rows=rows,
        use=use,
        off=SIDES,
        classes=frozenset(one.name for one in table),
        columns=lambda of, changes: models.columns(sample, of, changes, ()),
        vocabulary=models.vocabulary,
        bos=models.bos,
        n_layers=models.n_layers,
        given=models.given,
    )
    subject = _rebased(first)
    rounding = size((low - rows.plain)[use]) if low is not None else ROUNDING
    floor = max(rounding, *(s for side in SIDES if (s := subject.size(side, subject.plain)) <= OFF * rounding), 1e-6)
    off = tuple(side for side in SIDES if not subject.size(side, subject.plain) <= OFF * floor)
    subject = replace(
        subject,
        off=off or SIDES,
        columns=lambda of, changes: models.columns(sample, of, changes, _targets(subject, floor)),
    )
    run: list[results.Experiment] = []
    left: list[NotRun] = []
    cause = _accounted(subject, off, table, floor)
    if cause is None:
        cause = _search(subject, off, floor, run, left, progress)
    if cause is None and len(off) == 1 and len(table) and len(table[0].causes) == 1:
        cause = _from_table(subject, table[0], off[0], floor)
    settled: results.Settled = (
        "cause" if cause else "numerics" if not off else "side" if len(off) == 1 else "neither-side"
    )
    return Active(
        model=settings.model,
        dtype=settings.trainer_dtype,
        n_tokens=len(sample),
        n_sequences=len(sample.requests),
        n_judged=int(use.sum()),
        floor=floor,
        floor_dtype=models.low_dtype if low is not None else "",
        plain=_sizes(subject, subject.plain),
        settled=settled,
        side=cause.side if cause else off[0] if len(off) == 1 else None,
        cause=cause,
        experiments=tuple(run),
        left=tuple(left),
        seconds=time.perf_counter() - started,
    )


def _judged(sample: Sample, plain: Floats, rounding: float, table: Sequence[TableClass]) -> Mask:
    """`[N]` tokens that sizes are of: of steps whose weights are the model's, those that show what the table shows."""
    use = np.isfinite(sample.rollout) & np.isfinite(sample.trainer) & np.isfinite(plain)
    steps = sample.step[sample.sequence]
    if len(np.unique(sample.step)) > 1:
        near = [
            step
            for step in np.unique(sample.step)
            if (at := use & (steps == step)).any()
            and min(size((recorded - plain)[at]) for recorded in (sample.rollout, sample.trainer)) <= OFF * rounding
        ]
        here = np.isin(steps, near)
        use = use & here if near else use
    if table and table[0].share < 0.5 and (use & sample.shown).sum() >= _FEWEST_SHOWN:
        use = use & sample.shown
    return np.asarray(use)


def _rebased(subject: Subject) -> Subject:
    """The subject with a plain pass at the temperature that both sides record at, if there is one but 1."""
    best = subject
    for one in experiments()["temperature"].run(subject):
        assert one.column is not None
        other = replace(subject, rows=subject.rows.at_temperature(float(one.parameters["temperature"])))
        halved = all(other.size(side, other.plain) < best.size(side, best.plain) / 2 for side in SIDES)
        best = other if halved else best
    return best


def _targets(subject: Subject, floor: float) -> list[Target]:
    """What ends a job: a side that the plain pass does not reproduce, to within rounding."""
    return [
        Target(subject.recorded(side), subject.use, min(OFF * floor, subject.size(side, subject.plain) / SHRUNK))
        for side in subject.off
    ]


def _sizes(subject: Subject, column: Floats) -> SideSizes:
    return SideSizes(rollout=subject.size("rollout", column), trainer=subject.size("trainer", column))


def _search(
    subject: Subject,
    off: tuple[Side, ...],
    floor: float,
    run: list[results.Experiment],
    left: list[NotRun],
    progress: Progress,
) -> Cause | None:
    """Goes through experiments; those of the same forward pass together."""
    known = list(experiments().values())
    free = [one for one in known if not one.forwards]
    costly = sorted((one for one in known if one.forwards), key=lambda one: _order(one, subject))
    accepted = [found for one in free for found in _made(one, subject, floor, run)]
    for one in costly:
        missing = [name for name in one.needs if name not in subject.given]
        if accepted or missing or not (off or one.needs):
            left.append(NotRun(name=one.name, forwards=one.forwards, needs=_options(missing)))
            continue
        progress.message(f"experiment: {one.name}")
        accepted += _made(one, subject, floor, run)
    return _best(accepted, floor, subject)


def _order(one: Experiment, subject: Subject) -> tuple[bool, bool, int]:
    """Those of the table's classes first, then what the user brought, then the cheapest."""
    return not subject.classes & set(one.classes), not one.needs, one.forwards


def _options(missing: Sequence[str]) -> str:
    names = {"older": "--older-checkpoint", "base": "--base-model", "adapter": "--adapter"}
    return ", ".join(names[one] for one in missing)


def _made(one: Experiment, subject: Subject, floor: float, run: list[results.Experiment]) -> list[Accepted]:
    """An experiment's hypotheses, noted, and those that explain a side."""
    found = []
    for hypothesis in one.run(subject):
        sides = list(_explained(hypothesis, one.name, subject, floor))
        found += sides
        column = hypothesis.column
        run.append(
            results.Experiment(
                name=one.name,
                hypothesis=hypothesis.about,
                parameters=dict(hypothesis.parameters),
                forwards=hypothesis.forwards,
                seconds=hypothesis.seconds,
                sizes=None if column is None else _sizes(subject, column),
                explains=tuple(accepted.side for accepted in sides),
                why=hypothesis.why,
            )
        )
    return found


def _explained(hypothesis: Hypothesis, name: str, subject: Subject, floor: float) -> Iterator[Accepted]:
    """Sides that a hypothesis explains."""
    column = hypothesis.column
    if column is None or hypothesis.cause is None:
        return
    for side in SIDES if hypothesis.only is None else (hypothesis.only,):
        before, after = subject.size(side, subject.plain), subject.size(side, column)
        if hypothesis.like:
            yield Accepted(hypothesis, name, side, before, after, 0.0)
            continue
        beyond = before > _BEYOND * floor and after - floor <= (before - floor) / SHRUNK
        if after <= OFF * floor and (after <= before / SHRUNK or beyond):
            gain = _gain(subject, side, column)
            if gain >= LEAST_GAIN and gain * subject.use.sum() >= LEAST_TOTAL:
                yield Accepted(hypothesis, name, side, before, after, gain)


def _gain(subject: Subject, side: Side, column: Floats) -> float:
    """Log-likelihood of a side's tokens under a column and noise, less that under the plain pass, nats a token."""
    x = uncertainty(subject.plain[subject.use])
    totals = []
    for expected in (subject.plain, column):
        rest = np.nan_to_num((subject.recorded(side) - expected)[subject.use], nan=30.0, posinf=30.0, neginf=-30.0)
        totals.append(float(fit_noise(rest, x).log_density(rest, x).mean()))
    return totals[1] - totals[0]


def _best(accepted: Sequence[Accepted], floor: float, subject: Subject) -> Cause | None:
    """The hypothesis that gains most, with those whose columns are the same within rounding."""
    if not accepted:
        return None
    best = max(accepted, key=lambda one: one.gain)
    column, cause = best.hypothesis.column, best.hypothesis.cause
    assert column is not None
    assert cause is not None
    same = {
        one.hypothesis.cause.name: None
        for one in accepted
        if one.hypothesis.cause is not None
        and one.hypothesis.column is not None
        and one.side == best.side
        and size((one.hypothesis.column - column)[subject.use]) <= max(floor, 1e-4) / 2
    }
    return Cause(
        name=cause.name,
        side=cause.side or best.side,
        title=cause.title,
        fix=cause.fix,
        experiment=best.experiment,
        parameters=dict(best.hypothesis.parameters),
        before=best.before,
        after=best.after,
        floor=floor,
        gain=best.gain,
        as_well=(*cause.also, *(name for name in same if name not in (cause.name, *cause.also))),
    )


def _accounted(subject: Subject, off: tuple[Side, ...], table: Sequence[TableClass], floor: float) -> Cause | None:
    """What the table settles: values that no log-prob has, on the side that the plain pass does not reproduce there."""
    if not table or table[0].name not in _DETERMINISTIC:
        return None
    broken = [side for side in SIDES if not np.isfinite(subject.recorded(side)).all()]
    side = broken[0] if len(broken) == 1 else off[0] if len(off) == 1 else None
    return None if side is None else _from_table(subject, table[0], side, floor)


def _from_table(subject: Subject, found: TableClass, side: Side, floor: float) -> Cause:
    """The cause of a class of the table, whose side the plain pass tells."""
    before = subject.size(side, subject.plain)
    return Cause(
        name=found.causes[0],
        side=side,
        title=found.title,
        fix=found.fix,
        experiment="plain",
        parameters={},
        before=before,
        after=before,
        floor=floor,
        gain=0.0,
        as_well=found.causes[1:],
    )
