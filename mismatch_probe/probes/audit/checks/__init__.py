"""The checks of every precision pair, from a comparison and the model's own numbers.

Metrics of the catalogue are checked as they are. A check of the audit's own is a function; a module of this package
that registers one is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.probes.audit.judge import judged, judged_event, judged_extreme, missing, unseen_rate
from mismatch_probe.registered import Registry
from mismatch_probe.results.audit import Bounds, Check
from mismatch_probe.results.comparison import LengthGrowth, Pair
from mismatch_probe.results.finding import Finding, Value
from mismatch_probe.results.ranges import PartName, Range
from mismatch_probe.types import MetricValue

if TYPE_CHECKING:
    from mismatch_probe.probes.audit.profile import Profile

UNSUPPORTED = "fp16_unsupported"


@dataclass(frozen=True)
class Subject:
    """What a check is given.

    Attributes:
        rollout_dtype, trainer_dtype, trainer_mode: Of the precision pair.
        pair: The pair in the comparison; None where the engine does not support its rollout dtype.
        pairs: All pairs of the comparison.
        length: Of the comparison, with a prediction at the planned length.
        measured: On the model itself.
        stale: Parts that were measured with other settings.
        planned_tokens: Response length at which sequence weights have to serve.
    """

    rollout_dtype: str
    trainer_dtype: str
    trainer_mode: str
    pair: Pair | None
    pairs: Sequence[Pair]
    length: Mapping[str, LengthGrowth]
    measured: Range
    stale: Sequence[PartName]
    planned_tokens: int


Run = Callable[[Subject, Bounds], Check | None]


@dataclass(frozen=True)
class OwnCheck:
    """A check beside the metrics of the catalogue.

    Attributes:
        name: As profiles name it.
        run: Makes the check; None where it does not concern the pair.
        extreme: Whether it is of a maximum over the sequences that ran, of which what was not seen says little.
        rare: Whether it is of an event, which is judged by whether it occurs.
    """

    name: str
    run: Run
    extreme: bool
    rare: bool


_REGISTRY = Registry[OwnCheck](__name__, "check")


def check(name: str, *, extreme: bool = False, rare: bool = False) -> Callable[[Run], Run]:
    """Registers a check.

    Raises:
        ValueError: The name is taken.
    """

    def register(run: Run) -> Run:
        if name in CATALOG:
            raise ValueError(f"check {name} has the name of a metric")
        _REGISTRY.add(name, OwnCheck(name, run, extreme, rare))
        return run

    return register


def own_checks() -> dict[str, OwnCheck]:
    """Every registered check, by name."""
    return _REGISTRY.sorted()


def is_extreme(name: str) -> bool:
    """Whether a check is of a maximum, a minimum or a count, of which what was not seen says little."""
    own = own_checks().get(name)
    if own is not None:
        return own.extreme
    return name in CATALOG and not CATALOG[name].has_interval and name not in ("pareto_k", "score_drift")


def is_rare(name: str) -> bool:
    """Whether a check is of an event, which is judged by whether it occurs."""
    own = own_checks().get(name)
    return name == "confident_disagreement_rate" if own is None else own.rare


class Checks:
    """Makes the checks that a profile asks for.

    Args:
        profile: Limits.
        pairs: Of the comparison.
        length: Of the comparison, with a prediction at the planned length.
        measured: On the model itself.
        stale: Parts that were measured with other settings.
        planned_tokens: Response length at which sequence weights have to serve.
    """

    def __init__(
        self,
        profile: Profile,
        pairs: Sequence[Pair],
        length: Mapping[str, LengthGrowth],
        measured: Range,
        stale: Sequence[PartName],
        planned_tokens: int,
    ) -> None:
        self._bounds, self._pairs, self._length = profile.checks, pairs, length
        self._measured, self._stale, self._planned = measured, stale, planned_tokens

    def of_pair(self, pair: Pair) -> tuple[Check, ...]:
        """Every check that concerns a compared pair, in the profile's order."""
        subject, own = self._subject(pair.rollout_dtype, pair.trainer_dtype, pair.trainer_mode, pair), own_checks()
        made = (
            _metric(name, bounds, pair) if name in CATALOG else own[name].run(subject, bounds)
            for name, bounds in self._bounds.items()
        )
        return tuple(one for one in made if one is not None)

    def of_unsupported(self, rollout: str, trainer: str, mode: str, why: str) -> tuple[Check, ...]:
        """The checks of a pair whose rollout dtype the engine does not support: that, and what the model's own range
        says of FP16 all the same."""
        bounds = self._bounds.get(UNSUPPORTED, Bounds(fail_above=0.0, source="the installed vLLM"))
        told = finding("audit-dtype-unsupported", why=why)
        found = [judged(UNSUPPORTED, MetricValue(1.0), bounds, told, exact=True)]
        subject, own = self._subject(rollout, trainer, mode, None), own_checks()
        made = (own[name].run(subject, limits) for name, limits in self._bounds.items() if name in own)
        return (*found, *(one for one in made if one is not None and one.value.value is not None))

    def _subject(self, rollout: str, trainer: str, mode: str, pair: Pair | None) -> Subject:
        return Subject(
            rollout, trainer, mode, pair, self._pairs, self._length, self._measured, self._stale, self._planned
        )


def _metric(name: str, bounds: Bounds, pair: Pair) -> Check | None:
    value, info, n_prompts = pair.metrics[name], CATALOG[name], pair.n_prompts_usable
    if info.level == "exact" and pair.n_nonfinite_exact:
        found = finding("audit-exact-not-finite", metric=name, n=pair.n_nonfinite_exact)
        return missing(name, bounds, "compared positions are not finite", found)
    if info.level == "exact" and value.value is None:
        return None  # a check of runs that kept rows of logits
    if value.value is None:
        return missing(name, bounds, value.why, finding("audit-metric-missing", metric=name, why=value.why))
    if is_rare(name):
        count = int(pair.metrics["confident_disagreement_count"].value or 0)
        told = finding(
            "audit-metric-count", metric=name, n=count, n_tokens=pair.n_tokens, upper=upper(count, n_prompts)
        )
        return judged_event(name, count, value, bounds, told, n_prompts=n_prompts)
    told = finding("audit-metric-value", metric=name, value=value)
    if is_extreme(name):
        return judged_extreme(name, value, bounds, told, n_prompts=n_prompts)
    return judged(name, value, bounds, told, n_prompts=n_prompts)


def upper(hits: int, n_prompts: int) -> float | None:
    """Of an event that did not occur, the upper 95 % limit of the fraction of prompts that show it."""
    return None if hits else unseen_rate(n_prompts).ci_high


def finding(code: str, where: str = "", **values: Value) -> Finding:
    """Evidence of a check, which gives it its severity."""
    return Finding(code=code, severity="info", where=where, values=values)
