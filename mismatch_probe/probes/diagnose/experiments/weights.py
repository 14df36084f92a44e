"""Other weights: an older checkpoint, the base model, the adapter, layers that were not loaded."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject

_SYNC = (
    "Check that every update reaches the engine: compare a checksum of its weights with the trainer's after each one."
)
_OLDER = {
    "falls-behind": Named("restored-first-checkpoint", "One side has gone back to older weights", _SYNC),
    "one-step": Named("resume-serves-reference", "One side serves the reference's weights", _SYNC),
    "weight-lag": Named("async-staleness", "Responses come from older weights", _SYNC, "rollout"),
}
_STALE = Named("older-weights", "One side has older weights", _SYNC)
_BASE = Named(
    "adapter-ignored",
    "One side has the base model's weights",
    "Name the adapter in each request, or merge it before the weights are sent.",
)
_ADAPTER = Named(
    "adapter-ignored",
    "One side has the adapter, and the model that was named has it not",
    "Name the adapter in each request, or merge it before the weights are sent.",
)
_PARTIAL = Named(
    "partial-load",
    "Some layers still have older weights",
    "Compare the names that were sent with those that the engine loaded; a name that it does not know is left out.",
)


@experiment("older-checkpoint", classes=("falls-behind", "one-step", "weight-lag"), forwards=1, needs=("older",))
def older(subject: Subject) -> Iterator[Hypothesis]:
    """The older checkpoint."""
    named = next((cause for name, cause in _OLDER.items() if name in subject.classes), _STALE)
    return subject.forward("older", [ForwardChange("older checkpoint")], lambda _: named)


@experiment("base-model", classes=("falls-behind", "one-step"), forwards=1, needs=("base",))
def base(subject: Subject) -> Iterator[Hypothesis]:
    """The base model."""
    named = _OLDER["one-step"] if "one-step" in subject.classes else _BASE
    return subject.forward("base", [ForwardChange("base model")], lambda _: named)


@experiment("adapter", classes=("falls-behind",), forwards=1, needs=("adapter",))
def adapter(subject: Subject) -> Iterator[Hypothesis]:
    """The model with the adapter merged."""
    return subject.forward("adapter", [ForwardChange("with the adapter")], lambda _: _ADAPTER)


@experiment("partial-load", classes=("step-change",), forwards=60, needs=("older",))
def partial(subject: Subject) -> Iterator[Hypothesis]:
    """Layers of the older checkpoint: the end of their range first, then its beginning."""
    n = subject.n_layers
    ends = {one.about: end for end in range(1, n) for one in [Hypothesis(_range(0, end), None, None)]}
    best, end = float("inf"), 0
    for one in subject.forward("model", [_layers(0, e) for e in range(1, n)], lambda _: _PARTIAL):
        yield one
        if one.column is not None:
            left = min(subject.size(side, one.column) for side in subject.off)
            if left < best:
                best, end = left, ends[one.about]
    if end > 1:
        yield from subject.forward("model", [_layers(start, end) for start in range(1, end)], lambda _: _PARTIAL)


def _range(start: int, end: int) -> str:
    return f"layers {start} to {end - 1} older"


def _layers(start: int, end: int) -> ForwardChange:
    return ForwardChange(_range(start, end), donated=(start, end))
