"""What the estimates of a batch's gradient say together, and what limits them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from mismatch_probe.metrics.gradient import GRADIENT_KEYS
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.gradient import GradientEstimate, MissingPass, RolloutGradient
from mismatch_probe.types import MetricValue

# 1 − cosine² is the part of an estimate's mean square that lies off the reference. Below this part it agrees.
NEGLIGIBLE_TURN = 0.01
Agreement = Literal["gradient-turned", "gradient-undecided", "gradient-agrees"]
_SEVERITIES: dict[Agreement, Severity] = {
    "gradient-turned": "warn",
    "gradient-undecided": "note",
    "gradient-agrees": "info",
}


def agreement(cosine: MetricValue) -> Agreement:
    """Whether the estimate without weights agrees with the reference, by the limits of its cosine."""
    low, high = ((abs(limit) * limit if limit is not None else None) for limit in (cosine.ci_low, cosine.ci_high))
    if high is not None and high < 1 - NEGLIGIBLE_TURN:
        return "gradient-turned"
    return "gradient-agrees" if low is not None and low >= 1 - NEGLIGIBLE_TURN else "gradient-undecided"


def findings_of(passes: Sequence[RolloutGradient], missing: Sequence[MissingPass]) -> Iterator[Finding]:
    """Every rollout dtype is in one of three findings; corrections are judged where the gradient is turned."""
    plain = {found.rollout_dtype: found.estimates[0].metrics.cosine for found in passes}
    for code, severity in _SEVERITIES.items():
        cosines = {dtype: cosine for dtype, cosine in plain.items() if agreement(cosine) == code}
        if cosines:
            yield Finding(code=code, severity=severity, values={"cosine": cosines, "negligible": NEGLIGIBLE_TURN})
    for found in passes:
        if agreement(plain[found.rollout_dtype]) == "gradient-turned":
            yield _corrections(found)
    for found in passes:
        counts = {"empty": found.n_empty, "nonfinite": found.n_nonfinite, "impossible": found.n_impossible}
        if any(counts.values()):
            values: dict[str, Value] = {"dtype": found.rollout_dtype, "kept": found.n_sequences, **counts}
            yield Finding(code="gradient-sequences-left-out", severity="note", where=found.rollout_pass, values=values)
    for one in missing:
        yield Finding(code="gradient-pass-missing", severity="note", where=one.rollout_pass, values={"why": one.why})
    yield from _limits(passes)


def _corrections(found: RolloutGradient) -> Finding:
    """Whether one of the corrections that training in this dtype can have comes closer than none, by the intervals."""
    plain, *others = (estimate for estimate in found.estimates if found.own(estimate))
    known = [estimate for estimate in others if _place(estimate) is not None]
    best = max(known, key=lambda estimate: _place(estimate) or (0.0, 0.0), default=None)
    equal = tuple(estimate.correction for estimate in known if best and _place(estimate) == _place(best))
    values: dict[str, Value] = {"dtype": found.rollout_dtype, "corrections": equal}
    if best is None:
        values |= {"cosine": MetricValue(None, why="no correction has one")}
        return Finding(code="gradient-no-closer", severity="note", where=found.rollout_pass, values=values)
    low, high = best.metrics.cosine.ci_low, plain.metrics.cosine.ci_high
    values |= {"cosine": best.metrics.cosine}
    if low is None or high is None or low <= high:
        return Finding(code="gradient-no-closer", severity="note", where=found.rollout_pass, values=values)
    values |= {
        "algorithm": f"pg-{equal[0]}",
        "effective_batch": best.metrics.effective_batch,
    }
    return Finding(code="gradient-closest-correction", severity="info", where=found.rollout_pass, values=values)


def _place(estimate: GradientEstimate) -> tuple[float, float] | None:
    """Closer to the reference is better, then a larger effective batch; None where either has no value."""
    cosine, batch = estimate.metrics.cosine.value, estimate.metrics.effective_batch.value
    return None if cosine is None or batch is None else (cosine, batch)


def _limits(passes: Sequence[RolloutGradient]) -> Iterator[Finding]:
    """Each reason once, with the dtypes that it holds for."""
    dtypes: dict[str, dict[str, None]] = {}
    for found in passes:
        for estimate in found.estimates:
            for key in GRADIENT_KEYS:
                value: MetricValue = getattr(estimate.metrics, key)
                for why in filter(None, value.why.split("; ")):
                    dtypes.setdefault(why, {})[found.rollout_dtype] = None
    for why, names in sorted(dtypes.items()):
        yield Finding(code="gradient-limited", severity="note", values={"why": why, "dtypes": tuple(names)})
