"""The document of `rl sanity-set`: which problems a model solves sometimes. The file is `sanity.json`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import JsonValue

from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.rl_run import Provenance
from mismatch_probe.types import MetricValue


class ResponseLengths(Result):
    """Lengths of the responses, in tokens."""

    mean: float
    """Mean."""
    median: float
    """Median."""
    p90: float
    """90th percentile."""
    max: int
    """Longest."""


class SanityOutcome(Result):
    """Which problems were kept, and what their accuracy is worth."""

    n_problems: int
    """Problems that were tried."""
    n_kept: int
    """Problems whose accuracy lies within the bounds."""
    n_below: int
    """Problems below the lower bound."""
    n_above: int
    """Problems above the upper bound."""
    n_samples: int
    """Responses to each problem."""
    keep: tuple[float, float]
    """Bounds of the accuracy of the problems that are kept, both included; a fraction of the responses."""
    problems_by_right: tuple[int, ...]
    """How many problems have 0, 1, … `n_samples` right responses."""
    accuracy: float
    """Fraction of all responses that are right."""
    accuracy_of_kept_as_sampled: float | None
    """Mean accuracy of the kept problems by the samples that chose them; null where none was kept. It regresses to the
    mean on fresh samples, since a problem also gets in by luck."""
    accuracy_of_kept_estimate: MetricValue
    """The same without that bias: all samples of a problem but one choose, and the one counts, averaged over which it
    is. The interval is over problems."""
    response_tokens: ResponseLengths
    """Lengths of the responses."""
    truncated_fraction: float
    """Fraction of the responses that used up the budget."""
    n_grader_killed: int
    """Responses graded 0 because their grader was stopped."""


class SanitySet(Document):
    """The document of a sanity set; written when sampling starts and again when it ends."""

    KIND: ClassVar[str] = "sanity set"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe rl sanity-set --resume {folder}"

    config: dict[str, JsonValue]
    """Every setting, see `rl.config.SanityConfig`."""
    provenance: Provenance
    """When, where and from which weights sampling was started."""
    engines: tuple[dict[str, JsonValue], ...] = ()
    """What each engine says of itself; a resumed set can have several."""
    outcome: SanityOutcome | None = None
    """What was found; None while there is something left to sample."""
    findings: tuple[Finding, ...] = ()
    """Statements about the set, the most important one first."""
