"""Logged values of known metrics, gathered from records into one course for each run and name.

Shape legend: `N` steps.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.metric_log import Reading, Record
from mismatch_probe.metrics.reported import Reported, find

Floats = NDArray[np.float64]
_MOST_POINTS = 2_000_000  # of one metric
_MOST_SERIES = 500
_MOST_UNKNOWN = 2_000
_LARGEST = 1e100  # beyond it, squares and spreads overflow
_BUCKET = ("__MIN", "__MAX")  # of a wandb export: extremes of the steps that a point is the mean of


@dataclass(frozen=True)
class Course:
    """A metric of one run.

    Attributes:
        name: As it is logged.
        run: The run.
        reported: What it is.
        others: Further frameworks that use the name.
        steps: `[N]` steps in increasing order; places in the file where no steps are logged.
        values: `[N]` finite values.
        n_null: Values that are null.
        n_nan: Values that are NaN.
        n_inf: Values that are infinite, or beyond 1e100.
        n_repeated: Values of steps that are logged again later.
        n_backwards: How often the step goes back.
        has_steps: Whether steps are logged.
        bucket_max: Largest extreme of a wandb export, None where it has none.
    """

    name: str
    run: str
    reported: Reported
    others: tuple[str, ...]
    steps: Floats
    values: Floats
    n_null: int
    n_nan: int
    n_inf: int
    n_repeated: int
    n_backwards: int
    has_steps: bool
    bucket_max: float | None

    @property
    def key(self) -> str:
        """The catalogue's metric, empty where it has none that is the same."""
        return self.reported.key

    @property
    def label(self) -> str:
        """Its name, with the run where there are several."""
        return f"{self.name} ({self.run})" if self.run else self.name


@dataclass
class Collected:
    """All courses, and the names that are not known with how often each is logged."""

    courses: list[Course]
    unknown: Counter[str]


@dataclass
class _Points:
    """Values as they come; NaN is the step where none is logged."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    n_null: int = 0


def collect(records: Iterable[Record], reading: Reading) -> Collected:
    """Reads all records; only known names are kept.

    Raises:
        IngestError: A metric has more values than memory is meant for.
    """
    points: dict[tuple[str, str], _Points] = {}
    peaks: dict[tuple[str, str], float] = {}
    unknown: Counter[str] = Counter()
    for record in records:
        for name, value in record.values.items():
            if name.endswith(_BUCKET):
                if value is not None and name.endswith(_BUCKET[1]):
                    place = record.run, name.removesuffix(_BUCKET[1])
                    peaks[place] = max(peaks.get(place, value), value)
                continue
            if not find(name):
                if name in unknown or len(unknown) < _MOST_UNKNOWN:
                    unknown[name] += 1
                else:
                    reading.damage["names-left-out"] += 1
                continue
            place = record.run, name
            if place not in points and len(points) >= _MOST_SERIES:
                reading.damage["names-left-out"] += 1
                continue
            _add(points.setdefault(place, _Points()), record.step, value, name, reading)
    chosen = _choose([name for _, name in points])
    courses = [_course(run, name, found, chosen[name], peaks.get((run, name))) for (run, name), found in points.items()]
    return Collected(courses, unknown)


def _add(points: _Points, step: float | None, value: float | None, name: str, reading: Reading) -> None:
    if value is None:
        points.n_null += 1
        return
    if len(points.values) >= _MOST_POINTS:
        what = f"{reading.name} has more than {_MOST_POINTS:,} values of {name}."
        raise IngestError(what, "Cut the file, or keep every tenth step.")
    points.steps.append(np.nan if step is None else step)
    points.values.append(value)


def _choose(names: list[str]) -> dict[str, tuple[Reported, tuple[str, ...]]]:
    """For each name what it is: of the framework that most names point to, where several use it."""
    found = {name: find(name) for name in names}
    votes: Counter[str] = Counter()
    for candidates in found.values():
        if len(candidates) == 1 and not candidates[0].context:
            votes[candidates[0].framework] += 1
    chosen = {}
    for name, candidates in found.items():
        one = max(candidates, key=lambda each: votes[each.framework])
        chosen[name] = (one, tuple(each.framework for each in candidates if each is not one))
    return chosen


def _course(
    run: str, name: str, points: _Points, chosen: tuple[Reported, tuple[str, ...]], peak: float | None
) -> Course:
    steps, values = np.array(points.steps), np.array(points.values)
    has_steps = len(steps) > 0 and not bool(np.isnan(steps).any())
    backwards = int((np.diff(steps) < 0).sum()) if has_steps else 0
    if not has_steps:
        steps = np.arange(len(values), dtype=np.float64)
    # The last value of a step counts: a run that was restarted logs the steps after its checkpoint again.
    _, last = np.unique(steps[::-1], return_index=True)
    kept = len(steps) - 1 - last
    n_repeated = len(steps) - len(kept)
    steps, values = steps[kept], values[kept]
    finite = np.abs(values) <= _LARGEST
    return Course(
        name=name,
        run=run,
        reported=chosen[0],
        others=chosen[1],
        steps=steps[finite],
        values=values[finite],
        n_null=points.n_null,
        n_nan=int(np.isnan(values).sum()),
        n_inf=int((np.abs(values) > _LARGEST).sum()),
        n_repeated=n_repeated,
        n_backwards=backwards,
        has_steps=has_steps,
        bucket_max=peak,
    )
