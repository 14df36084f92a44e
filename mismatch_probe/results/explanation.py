"""The document of `explain`: what logged metrics are, how large, how they go over steps, and what would say more."""

from __future__ import annotations

from typing import ClassVar, Literal

from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue


class Point(Result):
    """A value with its step."""

    step: float
    """Training step; its place in the file where none is logged."""
    value: float
    """In the metric's unit."""


class Jump(Result):
    """The largest change from one logged step to the next."""

    before: Point
    """The step before it."""
    after: Point
    """The step after it."""
    units: float | None
    """Its distance from the median change, in standard deviations that the median absolute deviation of all changes
    stands for; None where more than half of the changes are equal."""


class Trend(Result):
    """A monotone trend over steps."""

    per_100: MetricValue
    """Theil–Sen slope with its 95 % interval, in the metric's unit per 100 steps."""
    tau: float
    """Kendall's τ."""
    p: float
    """Its p-value of independent steps, so too small for a run whose neighbouring steps resemble each other."""


class Limit(Result):
    """A published limit, and how the series lies to it."""

    text: str
    """What was published."""
    who: str
    """Who set it."""
    bound: float
    """The value."""
    side: Literal["above", "below"]
    """On which side of it a value is beyond the limit."""
    n_beyond: int
    """Steps beyond it."""
    first_beyond: float | None
    """The first of them; None where there is none."""
    last_beyond: bool
    """Whether the last step is."""


class Series(Result):
    """A metric of one run, over its steps."""

    name: str
    """As it is logged."""
    run: str
    """The run, where the file holds several; else empty."""
    framework: str
    """Which framework logs it so."""
    others: tuple[str, ...]
    """Frameworks that use the same name."""
    key: str
    """The metric of the catalogue; empty where it has none that is the same."""
    formula: str
    """What it is, in the catalogue's symbols; empty for what is not of the mismatch."""
    context: str
    """What it helps with, for what is not of the mismatch; else empty."""
    traits: tuple[str, ...]
    """How it differs from the catalogue's definition; each is a finding `log-` and its name."""
    n: int
    """Steps with a finite value; the numbers below are of these."""
    n_null: int
    """Steps whose value is null."""
    n_nan: int
    """Steps whose value is NaN."""
    n_inf: int
    """Steps whose value is infinite, or beyond 1e100."""
    n_repeated: int
    """Values of steps that were logged again later; they are left out."""
    n_backwards: int
    """How often the step went back."""
    has_steps: bool
    """Whether steps are logged; else values are counted in the order of the file, from 0."""
    first: Point | None
    """The first finite value; None where there is none."""
    last: Point | None
    """The last."""
    median: float | None
    """Over steps."""
    smallest: Point | None
    """The smallest."""
    largest: Point | None
    """The largest."""
    jump: Jump | None
    """None below 5 steps, or where nothing changes."""
    trend: Trend | None
    """None below 8 steps, or where nothing changes."""
    limits: tuple[Limit, ...]
    """Published limits of the metric, where it is the catalogue's."""

    def furthest(self, *, last: bool) -> Limit | None:
        """The furthest limit that the last value, or any, is beyond; None where there is none."""
        worst: Limit | None = None
        for limit in self.limits:
            if not (limit.last_beyond if last else limit.n_beyond):
                continue
            sign = 1 if limit.side == "above" else -1
            if worst is None or (limit.side == worst.side and sign * (limit.bound - worst.bound) > 0):
                worst = limit
        return worst

    @property
    def label(self) -> str:
        """Its name, with the run where there are several."""
        return f"{self.name} ({self.run})" if self.run else self.name

    @property
    def is_mismatch(self) -> bool:
        """Whether it is a metric of the mismatch."""
        return not self.context


class Derived(Result):
    """A metric that follows from others of the same steps."""

    key: str
    """The metric of the catalogue."""
    run: str
    """The run."""
    framework: str
    """Whose metrics it follows from."""
    formula: str
    """From which, and how."""
    n: int
    """Steps that have all of them."""
    last: Point
    """The last."""
    median: float
    """Over steps."""


class Prediction(Result):
    """A logged metric beside what an audit measured on the model."""

    name: str
    """As it is logged."""
    run: str
    """The run."""
    key: str
    """The metric."""
    predicted: MetricValue
    """Of the precision pair, in the audit."""
    last: float
    """The last logged value."""
    ratio: float | None
    """Last over predicted; None where the prediction is 0."""
    alarm: float | None
    """What a run should not exceed, by the audit; None where it names nothing for this metric."""

    @property
    def label(self) -> str:
        """Its name, with the run where there are several."""
        return f"{self.name} ({self.run})" if self.run else self.name


class AuditUsed(Result):
    """The audit that sizes are placed against."""

    source: str
    """Where it lies."""
    model: str
    """Its model."""
    pair: str
    """`rollout/trainer` dtypes and mode."""
    pairs: tuple[str, ...]
    """All of its pairs."""
    predictions: tuple[Prediction, ...]
    """The metrics that both have."""


class UnknownName(Result):
    """A name that no framework is known to log."""

    name: str
    """As it is logged."""
    n: int
    """How often."""
    nearest: tuple[str, ...]
    """Known names that look like it."""


class NextDump(Result):
    """The dump of a framework that would say more."""

    framework: str
    """Whose."""
    written_for: str
    """Project and version that its reader was written for."""
    sides: str
    """What of rollout and trainer it holds."""
    switch: str
    """How to have it written, a sentence."""
    pickles: bool
    """Whether it comes as pickles only."""
    command: str
    """What to run on it."""


class Explanation(Document):
    """The document of an explanation."""

    KIND: ClassVar[str] = "explanation"
    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int] = 1
    AGAIN: ClassVar[str] = "mismatch-probe explain FILE --json"

    source: str
    """What was read, as the user named it."""
    shape: str
    """How: `text`, `json`, `csv` or `tensorboard`."""
    frameworks: tuple[str, ...]
    """Whose metrics were found, the one with the most first."""
    series: tuple[Series, ...]
    """Metrics of the mismatch in the catalogue's order, then those that help to read them."""
    derived: tuple[Derived, ...]
    """Metrics that follow from them."""
    audit: AuditUsed | None
    """Beside which audit; None where none was named."""
    unknown: tuple[UnknownName, ...]
    """Names that are not known, those that resemble a known one first; at most 200."""
    n_unknown: int
    """How many names are not known."""
    dumps: tuple[NextDump, ...]
    """What would say more, by framework."""
    findings: tuple[Finding, ...]
    """What was found, the worst first."""

    def of(self, *severities: str) -> list[Finding]:
        """The findings of these severities."""
        return [finding for finding in self.findings if finding.severity in severities]
