"""The explanation of logged metrics: names, sizes, courses, and what would say more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.formats import formats
from mismatch_probe.ingest.metric_log import FORMATS, Reading, read_metrics
from mismatch_probe.metrics import course
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.reported import SWITCHES, Trait, find, nearest
from mismatch_probe.probes.explain import audited
from mismatch_probe.probes.explain.checks import Group, check_all, together
from mismatch_probe.probes.explain.collect import Collected, Course, collect
from mismatch_probe.results.explanation import (
    AuditUsed,
    Derived,
    Explanation,
    Jump,
    Limit,
    NextDump,
    Point,
    Series,
    Trend,
    UnknownName,
)
from mismatch_probe.results.finding import Finding, Value

_MOST_UNKNOWN = 200
_LOOKED_UP = 100  # unknown names that a known one is searched for
_NAMED, _SIMILAR = 12, 4  # names in an error
_PICKLES = {"torch", "pickle"}  # containers
# Where a trait cannot have changed the values `[N]`, it is not told.
_MATTERS: dict[Trait, Callable[[course.Floats], bool]] = {
    "float32": lambda sizes: bool(sizes.min() < 1e-6),
    "four-decimals": lambda sizes: bool(sizes.min() < 1e-2),
    "clamped-20": lambda sizes: bool(sizes.max() > 100),
}
_SEVERITIES = ("fail", "warn", "note", "info")


@np.errstate(all="ignore")  # a log may hold any number
def explain(source: str | Path | BinaryIO, name: str, audit: str | None = None, pair: str | None = None) -> Explanation:
    """Reads metrics and explains them.

    Args:
        source: A file, a folder, or an open binary stream.
        name: What the user called it.
        audit: An `audit.json`, or its folder, to place sizes against.
        pair: The audit's pair, `rollout/trainer`; None for the one that its verdict is of.

    Raises:
        IngestError: It cannot be read, or holds no metric of the mismatch.
        TableError: There is no such audit.
        UsageError: The audit has no such pair.
    """
    reading = Reading(name)
    found = collect(read_metrics(source, reading), reading)
    if not any(not one.reported.context for one in found.courses):
        raise _nothing(found, reading)
    courses = sorted(found.courses, key=_place)
    groups = _groups(courses)
    used = None if audit is None else audited.beside(audit, pair, courses)
    series = tuple(_series(one) for one in courses)
    frameworks = _frameworks(courses)
    findings = [
        *_reading_findings(reading, courses, frameworks),
        *_limit_findings(series),
        *([] if used is None else audited.findings(used)),
        *(one for group in groups for one in check_all(group)),
        *_trait_findings(courses),
        *_blind_spots(courses),
    ]
    unknown = tuple(_unknown(found))
    return Explanation(
        **Explanation.stamp(),
        source=name,
        shape=reading.shape,
        frameworks=frameworks,
        series=series,
        derived=tuple(one for group in groups for one in _derived(group)),
        audit=used,
        unknown=unknown[:_MOST_UNKNOWN],
        n_unknown=len(unknown),
        dumps=tuple(one for framework in frameworks for one in _dump(framework, used)),
        findings=tuple(sorted(findings, key=lambda one: _SEVERITIES.index(one.severity))),
    )


def _place(one: Course) -> tuple[object, ...]:
    keys = list(CATALOG)
    return bool(one.reported.context), one.run, keys.index(one.key) if one.key in keys else len(keys), one.name


def _frameworks(courses: list[Course]) -> tuple[str, ...]:
    votes = Counter(one.reported.framework for one in courses if not one.reported.context)
    return tuple(framework for framework, _ in votes.most_common())


def _groups(courses: list[Course]) -> list[Group]:
    """Courses by run and framework; what helps to read them counts for each framework of the run."""
    found = []
    for run in dict.fromkeys(one.run for one in courses):
        of_run = [one for one in courses if one.run == run and len(one.values)]
        for framework in dict.fromkeys(one.reported.framework for one in of_run if not one.reported.context):
            kept = (one for one in of_run if one.reported.context or one.reported.framework == framework)
            found.append(Group(framework, run, tuple(kept)))
    return found


def _nothing(found: Collected, reading: Reading) -> IngestError:
    """The error where no metric of the mismatch is there: what is, and what would switch them on."""
    if reading.has_tokens:
        what = f"{reading.name} has token log-probs, not metrics."
        return IngestError(what, f"Run `mismatch-probe compare --from {reading.name}`.")
    names = [one.name for one in found.courses] + [name for name, _ in found.unknown.most_common()]
    if not names:
        return IngestError(f"{reading.name} has no line with metrics.", f"Give {FORMATS}.")
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
    close = tuple(dict.fromkeys(one for name in names[:_LOOKED_UP] for one in nearest(name)))[:_SIMILAR]
    similar = f" Similar known names: {', '.join(close)}." if close else ""
    what = f"{reading.name} has no known metric of the mismatch; it has {shown}.{similar}"
    candidates = {known.framework for one in found.courses for known in find(one.name)}
    switches = [f"{name} with {switch}" for name, switch in SWITCHES.items() if switch and name in candidates]
    if switches:
        return IngestError(what, f"Log them: {'; '.join(switches)}.")
    return IngestError(what, f"Name metrics as {', '.join(SWITCHES)} log them.")


def _series(one: Course) -> Series:
    values, steps = one.values, one.steps
    jump = course.largest_jump(values)
    found = course.trend(steps, values)

    def at(index: int) -> Point:
        return Point(step=float(steps[index]), value=float(values[index]))

    some = len(values) > 0
    return Series(
        name=one.name,
        run=one.run,
        framework=one.reported.framework,
        others=one.others,
        key=one.key if one.key in CATALOG else "",
        formula=one.reported.formula,
        context=one.reported.context,
        traits=one.reported.traits,
        n=len(values),
        n_null=one.n_null,
        n_nan=one.n_nan,
        n_inf=one.n_inf,
        n_repeated=one.n_repeated,
        n_backwards=one.n_backwards,
        has_steps=one.has_steps,
        first=at(0) if some else None,
        last=at(-1) if some else None,
        median=float(np.median(values)) if some else None,
        smallest=at(int(np.argmin(values))) if some else None,
        largest=at(int(np.argmax(values))) if some else None,
        jump=None if jump is None else Jump(before=at(jump.before), after=at(jump.before + 1), units=jump.units),
        trend=None if found is None else Trend(per_100=found.per_100, tau=found.tau, p=found.p),
        limits=tuple(_limits(one)),
    )


def _limits(one: Course) -> Iterator[Limit]:
    if one.key not in CATALOG or not len(one.values):
        return
    for threshold in CATALOG[one.key].thresholds:
        values = np.abs(one.values) if threshold.of_size else one.values
        sides: tuple[tuple[Literal["above", "below"], tuple[float, ...]], ...]
        sides = (("above", threshold.above), ("below", threshold.below))
        for side, bounds in sides:
            for bound in bounds:
                beyond = values > bound if side == "above" else values < bound
                yield Limit(
                    text=threshold.text,
                    who=threshold.who,
                    bound=bound,
                    side=side,
                    n_beyond=int(beyond.sum()),
                    first_beyond=float(one.steps[np.argmax(beyond)]) if beyond.any() else None,
                    last_beyond=bool(beyond[-1]),
                )


def _limit_findings(series: tuple[Series, ...]) -> Iterator[Finding]:
    """For each metric the furthest limit that its last value is beyond, else the furthest that any was."""
    for one in series:
        last = one.furthest(last=True)
        worst = last or one.furthest(last=False)
        if worst is None or one.first is None or one.last is None:
            continue
        others = (limit.who for limit in one.limits if (limit.last_beyond if last else limit.n_beyond))
        values: dict[str, Value] = {
            "metric": one.key,
            "last": one.last.value,
            "bound": worst.bound,
            "side": worst.side,
            "text": worst.text,
            "who": worst.who,
            "others": tuple(dict.fromkeys(who for who in others if who != worst.who)),
            "n": worst.n_beyond,
            "steps": one.n,
            "first_beyond": worst.first_beyond,
            "from_start": worst.first_beyond == one.first.step,
        }
        code = "log-limit-exceeded" if last else "log-limit-was-exceeded"
        yield Finding(code=code, severity="warn" if last else "note", where=one.label, values=values)


def _reading_findings(reading: Reading, courses: list[Course], frameworks: tuple[str, ...]) -> Iterator[Finding]:
    for what, n in sorted(reading.damage.items()):
        yield Finding(code=f"log-{what}", severity="note", where=reading.name, values={"n": n})
    for one in courses:
        if one.n_null or one.n_nan or one.n_inf:
            yield Finding(
                code="log-not-finite",
                severity="warn",
                where=one.label,
                values={"missing": one.n_null, "nan": one.n_nan, "inf": one.n_inf, "finite": len(one.values)},
            )
    peaks = ((one.label, one.bucket_max or 0.0, float(one.values.max())) for one in courses if len(one.values))
    hidden = [peak for peak in peaks if peak[1] > peak[2] > 0]
    if hidden:
        label, largest, shown = max(hidden, key=lambda peak: peak[1] / peak[2])
        averaged: dict[str, Value] = {"largest": largest, "shown": shown, "series": len(hidden)}
        yield Finding(code="log-averaged-steps", severity="note", where=label, values=averaged)
    repeated = [one for one in courses if one.n_repeated]
    if repeated:
        most = max(repeated, key=lambda one: one.n_repeated)
        yield Finding(
            code="log-steps-repeated",
            severity="note",
            where=most.label,
            values={"n": most.n_repeated, "series": len(repeated), "backwards": most.n_backwards},
        )
    backwards = [one for one in courses if one.n_backwards and not one.n_repeated]
    if backwards:
        yield Finding(
            code="log-steps-out-of-order",
            severity="note",
            where=backwards[0].label,
            values={"n": backwards[0].n_backwards},
        )
    unnumbered = [one for one in courses if not one.has_steps and len(one.values) > 1]
    if unnumbered:
        yield Finding(code="log-steps-missing", severity="note", where=unnumbered[0].label)
    if len(frameworks) > 1:
        yield Finding(code="log-several-frameworks", severity="note", values={"names": frameworks})
    shared: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for one in courses:
        if one.others and not one.reported.context:
            shared.setdefault((one.reported.framework, one.others), {})[one.name] = None
    for (taken, others), names in shared.items():
        values: dict[str, Value] = {"names": tuple(names), "others": others}
        yield Finding(code="log-name-shared", severity="note", where=taken, values=values)


def _trait_findings(courses: list[Course]) -> Iterator[Finding]:
    by_trait: dict[tuple[str, str], dict[str, None]] = {}
    for one in courses:
        for trait in one.reported.traits:
            if trait in _MATTERS and not (len(one.values) and _MATTERS[trait](np.abs(one.values))):
                continue
            by_trait.setdefault((one.reported.framework, trait), {})[one.name] = None
    for (framework, name), names in by_trait.items():
        yield Finding(code=f"log-{name}", severity="note", where=framework, values={"names": tuple(names)})


def _blind_spots(courses: list[Course]) -> Iterator[Finding]:
    """What no table of metrics can say, and what this one could have said."""
    keys = {one.key for one in courses}
    yield Finding(code="log-blind-to-tokens", severity="info")
    yield Finding(code="log-blind-to-side", severity="info")
    if not ({"mean_ratio", "chi2_token"} & keys or {"kl_k1", "kl_k3"} <= keys):
        yield Finding(code="log-blind-to-direction", severity="info")
    yield Finding(code="log-blind-to-cause", severity="info")


def _derived(group: Group) -> Iterator[Derived]:
    def one(key: str, formula: str, steps: object, values: object) -> Iterator[Derived]:
        at, found = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
        usable = np.isfinite(found)
        if usable.any():
            last = Point(step=float(at[usable][-1]), value=float(found[usable][-1]))
            n, median = int(usable.sum()), float(np.median(found[usable]))
            yield Derived(
                key=key, run=group.run, framework=group.framework, formula=formula, n=n, last=last, median=median
            )

    if found := group.by_key("kl_k1", "kl_k3"):
        both = together(*found)
        yield from one("mean_ratio", "1 + k3 − k1", both.steps, 1 + both.second - both.first)
        if more := group.by_key("chi2_token"):
            k1, k3 = together(found[0], more[0]), together(found[1], more[0])
            if len(k1.steps) == len(k3.steps) and len(k1.steps):
                ratio = 1 + k3.first - k1.first
                with np.errstate(divide="ignore", invalid="ignore"):
                    yield from one("ess_token", "(1 + k3 − k1)² / (1 + χ²)", k1.steps, ratio**2 / (1 + k1.second))
    entropy = group.context("entropy")
    if entropy is not None and (found := group.by_key("kl_k3")):
        both = together(found[0], entropy)
        with np.errstate(divide="ignore", invalid="ignore"):
            yield from one("kl_entropy_ratio", "k3 / entropy", both.steps, both.first / both.second)


def _unknown(found: Collected) -> Iterator[UnknownName]:
    """Names that resemble a known one first, then those that are logged most."""
    looked = {name: nearest(name) for name, _ in found.unknown.most_common(_LOOKED_UP)}
    ordered = sorted(found.unknown.items(), key=lambda item: (not looked.get(item[0]), -item[1]))
    return (UnknownName(name=name, n=n, nearest=looked.get(name, ())) for name, n in ordered)


def _dump(framework: str, used: AuditUsed | None) -> Iterator[NextDump]:
    """The first dump of a framework that `ingest` reads."""
    for one in formats().values():
        if framework in one.project.split(", ") and not one.refusal:
            pickles = set(one.containers) <= _PICKLES
            both = "trainer" in one.sides or one.sides.startswith("both")
            model = "" if both else f" --model {used.model if used else 'MODEL'}"
            trust = " --trust-pickle" if pickles else ""
            yield NextDump(
                framework=framework,
                written_for=one.written_for,
                sides=one.sides,
                switch=one.switch,
                pickles=pickles,
                command=f"mismatch-probe compare --from DIR{model}{trust}",
            )
            return
