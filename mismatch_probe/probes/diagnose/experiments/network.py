"""The same weights in another network: positions, windows, quantisation, caps, coarse rounding, dropout."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject

_SCALING = Named(
    "rope-scaling",
    "The sides rotate by other frequencies",
    "Give both sides the same rope parameters: compare config.json with what the engine prints at its start.",
)
_LOST = Named(
    "buffers-lost",
    "Rotary frequencies were lost, or made again with another base",
    "Make non-persistent buffers again, from the model's own configuration, after moving or loading it.",
    also=("rope-scaling",),
)
_POSITIONS = Named(
    "bf16-position-ids", "Position ids are rounded to BF16", "Keep position ids in integers, out of autocast and casts."
)
_LONG = Named(
    "rope-long-positions",
    "Positions are wrong from one on",
    "Make rotary tables as long as the longest sequence, in FP32.",
)
_QUANTISED = Named(
    "quantised-weights",
    "Weights are quantised",
    "Train against the same quantised weights, correct for it by importance sampling, or serve in 16 bit.",
)
_WINDOW = Named(
    "window-missing",
    "Attention of one side has a window",
    "Use the same attention implementation and sliding_window on both sides.",
)
_CAP = Named(
    "soft-cap-or-sink-missing",
    "One side caps its logits, or its attention has a sink, and the other side does not",
    "Use an attention implementation and a head that have the model's soft caps and sinks.",
)
_COARSE = Named(
    "coarser-rounding",
    "Hidden states are rounded more coarsely",
    "Keep the residual stream in BF16 at least: look for FP8 or autocast around whole layers.",
)
_DROPOUT = Named(
    "dropout",
    "The gap is as large as dropout makes it, and without a pattern",
    "Put the model into eval mode for log-probs, or set its dropout to 0.",
    "trainer",
)
_WITHOUT_PATTERN = {"other-forward", "trainer-noise"}
_RATES = (0.02, 0.05, 0.1, 0.2, 0.3)


@experiment("quantised", classes=("other-forward",), forwards=4)
def quantised(subject: Subject) -> Iterator[Hypothesis]:
    """Projections rounded to INT4, FP8 or INT8."""
    kinds = {"int4": "INT4, groups of 32", "int4-row": "INT4, by row", "fp8": "FP8, by row", "int8": "INT8, by row"}
    changes = [ForwardChange(f"weights in {about}", kind=kind) for kind, about in kinds.items()]
    return subject.forward("model", changes, lambda _: _QUANTISED)


@experiment("coarser-rounding", classes=("other-forward",), forwards=4)
def coarse(subject: Subject) -> Iterator[Hypothesis]:
    """The stream between layers with fewer bits of mantissa than BF16's 7."""
    changes = [ForwardChange(f"the stream with {bits} bits", kind="mantissa", value=bits) for bits in (4, 3, 2, 1)]
    return subject.forward("model", changes, lambda _: _COARSE)


@experiment("positions", classes=("positions",), forwards=2)
def positions(subject: Subject) -> Iterator[Hypothesis]:
    """Position ids in BF16, rotary frequencies that are all 1."""
    changes = [
        ForwardChange("position ids in BF16", kind="positions-bfloat16"),
        ForwardChange("rotary frequencies lost", kind="rope-lost"),
    ]
    return subject.forward("model", changes, lambda change: _LOST if change.kind == "rope-lost" else _POSITIONS)


@experiment("caps", classes=("other-forward", "temperature"), forwards=18)
def caps(subject: Subject) -> Iterator[Hypothesis]:
    """Logits softly capped, an attention sink."""
    yield from subject.scan(
        lambda c: ForwardChange(f"logits capped at {c:.4g}", kind="logit-cap", value=c), (5, 10, 20, 40), _CAP
    )
    yield from subject.scan(
        lambda x: ForwardChange(f"a sink of logit {x:.4g}", kind="sink", value=x), (0.5, 1, 2, 4, 8), _CAP
    )


@experiment("rotary", classes=("positions",), forwards=28)
def rotary(subject: Subject) -> Iterator[Hypothesis]:
    """Rotary frequencies divided, scaled as YaRN does, or of another base."""
    yield from subject.scan(
        lambda f: ForwardChange(f"frequencies divided by {f:.4g}", kind="rope-divided", value=f),
        (1.25, 2, 4, 8),
        _SCALING,
    )
    kinds = {"rope-yarn": "the length", "rope-yarn-2": "half the length", "rope-yarn-4": "a quarter of the length"}
    yarn = [ForwardChange(f"YaRN by {f} of {kinds[k]}", kind=k, value=f) for f in (2, 4, 8) for k in kinds]
    yield from subject.forward("model", yarn, lambda _: _SCALING)
    yield from subject.scan(
        lambda x: ForwardChange(f"rotary base {x:.4g}", kind="rope-base", value=x), (1e3, 1e4, 1e5, 1e6, 1e7), _LOST
    )


@experiment("reach", classes=("positions",), forwards=36)
def reach(subject: Subject) -> Iterator[Hypothesis]:
    """Attention that sees so many tokens, positions that are wrong from one on."""
    longest = max(one.length for one in subject.sample.requests)
    grid = [float(x) for x in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if x < longest]
    yield from subject.scan(
        lambda w: ForwardChange(f"attention sees {w:.0f} tokens", kind="window", value=w), grid, _WINDOW, integer=True
    )
    yield from subject.scan(
        lambda p: ForwardChange(f"positions end at {p:.0f}", kind="positions-clipped", value=p),
        grid,
        _LONG,
        integer=True,
    )
    yield from subject.scan(
        lambda p: ForwardChange(f"half steps from position {p:.0f}", kind="positions-halved", value=p),
        grid,
        _LONG,
        integer=True,
    )


@experiment("dropout", classes=("trainer-noise",), forwards=5)
def dropout(subject: Subject) -> Iterator[Hypothesis]:
    """Dropout, which is random and shows no pattern: the trainer would be as far from the plain pass, at some rate."""
    if subject.classes - _WITHOUT_PATTERN:
        return
    part = subject.part
    gap = part.size("trainer", part.plain)
    changes = [ForwardChange(f"dropout of {rate}", kind="dropout", value=rate) for rate in _RATES]
    for change, column, why, seconds in part.columns(part, "model", changes if "trainer" in subject.off else []):
        ratio = 0.0 if column is None else gap / max(part.from_plain(column), 1e-12)
        cause = _DROPOUT if 0.5 <= ratio <= 2.0 else None
        sizes = None if column is None else part.sizes(column)
        yield Hypothesis(change.name, cause, None, {"ratio": ratio}, 1, seconds, why, "trainer", like=True, sizes=sizes)
