"""One engine or rank of several is off."""

from __future__ import annotations

from mismatch_probe.probes.diagnose.base import Fit, State, by_level
from mismatch_probe.probes.diagnose.evidence import Evidence, Mask
from mismatch_probe.probes.diagnose.signatures import signature


@signature(
    "replica",
    kind="forward",
    title="The gap is that of some replicas only",
    causes=("replica-topology",),
    confirm="Score the same ids on a good and on the named replica.",
    fix=(
        "Compare that replica's parallel sizes, kernels, dtype and weights with those of the others; restart it "
        "with theirs."
    ),
)
def replica(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise in rows of some replicas."""
    codes = evidence.rows.get("replica")
    if codes is None:
        return None
    level = evidence.of_sequence(codes)
    fit = by_level(evidence, state, train, level, {})
    if fit is None:
        return None
    worst = level[fit.shown]
    names = evidence.labels.get("replica", ())
    label = names[int(worst[0])] if names and len(worst) else ""
    return Fit(fit.log_density, fit.state, fit.shown, {**fit.parameters, "replica": label})
