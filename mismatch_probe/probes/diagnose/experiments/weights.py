"""Other weights: an older checkpoint, the base model, the adapter, layers not loaded or in each other's place."""

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
_SCALE = Named(
    "lora-scale",
    "One side has the update at another scale",
    "Compare alpha and rank of the adapter, and what each side makes of them (alpha/r, or alpha/sqrt(r) with rsLoRA).",
)
_LAYERS = (
    "Compare the names that were sent with those that the engine loaded; names that it does not know are left out."
)
_PARTIAL = Named("partial-load", "The first layers still have older weights", _LAYERS)
_FORGOTTEN = Named("layer-forgotten", "Some layers still have older weights", _LAYERS)
_MAPPING = Named(
    "wrong-mapping",
    "Weights were loaded into each other's place",
    "Compare the mapping of names, layer by layer, with the checkpoint's.",
)


@experiment("older-checkpoint", classes=("falls-behind",), forwards=1, needs=("older",))
def older(subject: Subject) -> Iterator[Hypothesis]:
    """The older checkpoint."""
    named = next((cause for name, cause in _OLDER.items() if name in subject.classes), _STALE)
    return subject.forward("older", [ForwardChange("older checkpoint")], lambda _: named)


@experiment("base-model", classes=("falls-behind",), forwards=13, needs=("base",))
def base(subject: Subject) -> Iterator[Hypothesis]:
    """The base model, then the difference between it and the model at another scale."""
    yield from subject.forward("base", [ForwardChange("base model")], lambda _: _BASE)
    yield from subject.scan(_scaled, (0.25, 0.5, 2.0, 4.0), _SCALE)


@experiment("adapter", classes=("falls-behind",), forwards=13, needs=("adapter",))
def adapter(subject: Subject) -> Iterator[Hypothesis]:
    """The model with the adapter merged, as it is and at another scale."""
    yield from subject.forward("adapter", [ForwardChange("with the adapter")], lambda _: _ADAPTER)
    yield from subject.scan(_scaled, (0.25, 0.5, 2.0, 4.0), _SCALE, of="adapter")


def _scaled(factor: float) -> ForwardChange:
    return ForwardChange(f"the update times {factor:.4g}", kind="blended", value=factor)


@experiment("partial-load", classes=("other-forward",), forwards=60, needs=("older",))
def partial(subject: Subject) -> Iterator[Hypothesis]:
    """Layers of the older checkpoint: each alone, then the best one with its neighbours for as long as that helps."""
    n = subject.n_layers
    left: dict[ForwardChange, float] = {}
    wanted = [_layers(i, i + 1) for i in range(n)]
    while wanted:
        yield from subject.screened("model", wanted, _of_layers, left)
        if not left:
            return
        first, end = min(left, key=left.__getitem__).layers
        around = [_layers(*x) for x in ((first - 1, end), (first, end + 1)) if x[0] >= 0 and x[1] <= n]
        wanted = [one for one in around if one not in left]
    yield from subject.best("model", left, _of_layers)


def _of_layers(change: ForwardChange) -> Named:
    return _PARTIAL if change.layers[0] == 0 else _FORGOTTEN


def _layers(first: int, end: int) -> ForwardChange:
    return ForwardChange(f"layers {first} to {end - 1} older", kind="donated", layers=(first, end))


@experiment("mapping", classes=("other-forward",), forwards=90)
def mapping(subject: Subject) -> Iterator[Hypothesis]:
    """Layer by layer: keys for values, a layer for the next one, experts by one place on."""
    n = subject.n_layers
    changes = [
        ForwardChange(f"layers {i} and {i + 1} exchanged", kind="swapped", layers=(i, i + 2)) for i in range(n - 1)
    ]
    for kind, about in (("keys-values", "keys and values exchanged"), ("experts", "experts by one place on")):
        changes += [ForwardChange(f"layer {i}: {about}", kind=kind, layers=(i, i + 1)) for i in range(n)]
    return subject.forward("model", changes, lambda _: _MAPPING)
