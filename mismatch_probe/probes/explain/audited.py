"""Logged metrics beside an audit of the model: what it measured for a precision pair, and the alarm that it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mismatch_probe.config.probes import pair_dtypes
from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.probes.audit.baseline import read_audit
from mismatch_probe.probes.explain.collect import Course
from mismatch_probe.results.audit import Audit, AuditedPair
from mismatch_probe.results.explanation import AuditUsed, Prediction
from mismatch_probe.results.finding import Finding, Severity
from mismatch_probe.types import MetricValue

# An alarm is of k3.
_ALARM = "kl_k3"
# What is larger where the gap is: a ratio of two says something.
_SIZES = frozenset(
    {"mean_abs_logprob_diff", "max_abs_logprob_diff", "mean_abs_prob_diff", "max_abs_prob_diff", "std_prob_diff"}
    | {"kl_k2", "kl_k3", "js_k3", "chi2_token"}
)


def beside(path: str, pair: str | None, courses: Iterable[Course]) -> AuditUsed:
    """The metrics that the audit has, too.

    Args:
        path: An `audit.json`, or its folder.
        pair: `rollout/trainer`; None for the pair that the audit's verdict is of.
        courses: What is logged.

    Raises:
        TableError: There is no such audit.
        UsageError: The audit has no such pair, or no pair at all.
    """
    audit = read_audit(path)
    chosen = pair_of(audit, path, pair)
    known = {
        check.name: check.value for check in chosen.checks if check.value.value is not None and check.name in _SIZES
    }
    known.setdefault("mean_abs_logprob_diff", chosen.mean_abs_logprob_diff)
    recommended = audit.recommendation
    alarm = recommended.alarm_kl_k3 if recommended is not None and recommended.key == chosen.key else None
    predictions = (_prediction(one, known[one.key], alarm) for one in courses if one.key in known and len(one.values))
    return AuditUsed(
        source=path,
        model=audit.model,
        pair=_name(chosen),
        pairs=tuple(_name(one) for one in audit.pairs),
        predictions=tuple(predictions),
    )


def pair_of(audit: Audit, path: str, asked: str | None) -> AuditedPair:
    """A pair of an audit.

    Args:
        audit: The audit.
        path: Where it lies.
        asked: `rollout/trainer`; None for the pair that its verdict is of.

    Raises:
        UsageError: The audit has no such pair, or no pair at all.
    """
    if not audit.pairs:
        raise UsageError(f"The audit {path} has no pair of dtypes.", "Name another audit, or leave --audit out.")
    if asked is None:
        return audit.deciding[0] if audit.deciding else audit.pairs[0]
    wanted = pair_dtypes(asked)
    found = [one for one in audit.pairs if one.dtypes == wanted]
    if not found:
        known = dict.fromkeys(f"{_short(one.rollout_dtype)}/{_short(one.trainer_dtype)}" for one in audit.pairs)
        names = ", ".join(known)
        raise UsageError(f"The audit {path} has no pair {asked}; it has {names}.", "Choose one of them with --pair.")
    return found[0]


def _short(dtype: str) -> str:
    return next((short for short, name in SHORT_DTYPES.items() if name == dtype), dtype)


def _name(pair: AuditedPair) -> str:
    mode = f" ({pair.trainer_mode})" if pair.trainer_mode else ""
    return f"{_short(pair.rollout_dtype)}/{_short(pair.trainer_dtype)}{mode}"


def _prediction(one: Course, predicted: MetricValue, alarm: float | None) -> Prediction:
    last = float(one.values[-1])
    return Prediction(
        name=one.name,
        run=one.run,
        key=one.key,
        predicted=predicted,
        last=last,
        ratio=last / predicted.value if predicted.value else None,
        alarm=alarm if one.key == _ALARM else None,
    )


def findings(used: AuditUsed) -> Iterator[Finding]:
    """How each lies to its prediction."""
    for one in used.predictions:
        if one.alarm is not None and one.last > one.alarm:
            yield Finding(
                code="log-above-alarm",
                severity="warn",
                where=one.label,
                values={"metric": one.key, "last": one.last, "alarm": one.alarm, "pair": used.pair},
            )
        high = one.predicted.value if one.predicted.ci_high is None else one.predicted.ci_high
        above = one.ratio is not None and high is not None and one.last > high
        severity: Severity = "note" if above else "info"
        code = "log-above-prediction" if above else "log-within-prediction"
        yield Finding(
            code=code,
            severity=severity,
            where=one.label,
            values={
                "metric": one.key,
                "last": one.last,
                "predicted": one.predicted,
                "ratio": one.ratio,
                "pair": used.pair,
            },
        )
