"""What the estimates of a batch's gradient say together, and what limits them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from mismatch_probe.metrics.gradient import GRADIENT_KEYS
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.gradient import GradientEstimate, MissingPass, RolloutGradient
from mismatch_probe.types import MetricValue

# 1 − cosine² is the part of an estimate's mean square that lies off the reference. Below this part it agrees.
NEGLIGIBLE = 0.01
Agreement = Literal["gradient-turned", "gradient-undecided", "gradient-agrees"]
_SEVERITIES: dict[Agreement, Severity] = {
    "gradient-turned": "warn",
    "gradient-undecided": "note",
    "gradient-agrees": "info",
}


def agreement(cosine: MetricValue) -> Agreement:
    """Whether the estimate without weights agrees with the reference, by the limits of its cosine."""
    low, high = ((abs(limit) * limit if limit is not None else None) for limit in (cosine.ci_low, cosine.ci_high))
    if high is not None and high < 1 - NEGLIGIBLE:
        return "gradient-turned"
    return "gradient-agrees" if low is not None and low >= 1 - NEGLIGIBLE else "gradient-undecided"


def findings_of(passes: Sequence[RolloutGradient], missing: Sequence[MissingPass]) -> Iterator[Finding]:
    """Every rollout dtype is in one of three findings; a correction is recommended where the gradient is turned."""
    plain = {found.rollout_dtype: found.estimates[0].metrics.cosine for found in passes}
    for code, severity in _SEVERITIES.items():
        cosines = {dtype: cosine for dtype, cosine in plain.items() if agreement(cosine) == code}
        if cosines:
            yield Finding(code=code, severity=severity, values={"cosine": cosines, "negligible": NEGLIGIBLE})
    for found in passes:
        if agreement(plain[found.rollout_dtype]) == "gradient-turned":
            yield from _closest(found)
    for found in passes:
        counts = {"empty": found.n_empty, "nonfinite": found.n_nonfinite, "impossible": found.n_impossible}
        if any(counts.values()):
            values: dict[str, Value] = {"dtype": found.rollout_dtype, "kept": found.n_sequences, **counts}
            yield Finding(code="gradient-sequences-left-out", severity="note", where=found.rollout_pass, values=values)
    for one in missing:
        yield Finding(code="gradient-pass-missing", severity="note", where=one.rollout_pass, values={"why": one.why})
    yield from _limits(passes)


def _closest(found: RolloutGradient) -> Iterator[Finding]:
    """The estimate nearest to the reference among those that training in this dtype can have."""
    known = [estimate for estimate in found.estimates if found.own(estimate) and _place(estimate) is not None]
    if not known:
        return
    best = max(known, key=lambda estimate: _place(estimate) or (0.0, 0.0))
    equal = tuple(estimate.correction for estimate in known if _place(estimate) == _place(best))
    algorithm = {"none": "pg", "icepop": "icepop"}.get(equal[0], f"pg-{equal[0]}")
    values: dict[str, Value] = {
        "dtype": found.rollout_dtype,
        "corrections": equal,
        "algorithm": algorithm,
        "cosine": best.metrics.cosine,
        "effective_batch": best.metrics.effective_batch,
    }
    yield Finding(code="gradient-closest-correction", severity="info", where=found.rollout_pass, values=values)


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
