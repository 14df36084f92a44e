"""The engine's own passes over the recorded ids, with the model's weights: by prefill, and decoded again."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject
from mismatch_probe.probes.diagnose.experiments.recorded import DECODE

_ENGINE = Named(
    "engine-forward",
    "The engine computes other log-probs from these weights, by prefill as well",
    "`mismatch-probe attribute` names the setting, the layer or the weight.",
    "rollout",
)


@experiment("engine", classes=("decode-prefill",), forwards=25, needs=("engine",))
def run(subject: Subject) -> Iterator[Hypothesis]:
    """Prefill, then decode; what both are is the engine's forward pass, and no fault of decode."""
    before, by_prefill = subject.size("rollout", subject.plain), False
    changes = [
        ForwardChange("the engine's prefill", kind="prefill"),
        ForwardChange("the engine's decode", kind="decode"),
    ]
    for change, column, why, seconds in subject.columns(subject, "engine", changes):
        cause = DECODE if change.kind == "decode" and not by_prefill else _ENGINE
        if change.kind == "prefill" and column is not None:
            by_prefill = subject.size("rollout", column) <= before / 2
        yield Hypothesis(change.name, cause, column, {}, 1, seconds, why, "rollout")
