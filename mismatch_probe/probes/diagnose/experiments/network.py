"""The same weights in another network: positions, quantisation, dropout, windows."""

from __future__ import annotations

from collections.abc import Iterator

from mismatch_probe.engines.diagnose.changes import ForwardChange
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import Hypothesis, Named, Subject

_ROPE = Named(
    "rope-scaling",
    "The sides rotate by other frequencies",
    "Give both sides the same rope parameters: compare config.json with what the engine prints at its start.",
)
_LOST = Named(
    "buffers-lost",
    "Rotary frequencies were lost",
    "Make non-persistent buffers again after moving or loading a model.",
)
_POSITIONS = Named(
    "bf16-position-ids", "Position ids are rounded to BF16", "Keep position ids in integers, out of autocast and casts."
)
_QUANTISED = Named(
    "quantised-weights",
    "Weights are quantised",
    "Train against the same quantised weights, correct for it by importance sampling, or serve in 16 bit.",
)
_CACHE = Named(
    "fp8-cache", "Keys and values are kept in FP8", "Set kv_cache_dtype=auto, or calibrate the cache's scales."
)
_DROPOUT = Named(
    "dropout", "Dropout is on", "Put the model into eval mode for log-probs, or set its dropout to 0.", "trainer"
)
_WINDOW = Named(
    "window-missing",
    "Attention of one side has a window",
    "Use the same attention implementation and sliding_window on both sides.",
)


@experiment("positions", classes=("positions",), forwards=8)
def positions(subject: Subject) -> Iterator[Hypothesis]:
    """Position ids in BF16, and other rotary frequencies."""
    causes = {"position ids in BF16": _POSITIONS, "rotary frequencies lost": _LOST}
    changes = [
        ForwardChange("position ids in BF16", positions="bfloat16"),
        ForwardChange("rotary frequencies lost", rope="lost"),
        *(ForwardChange(f"positions divided by {f}", rope=f"linear:{f}") for f in (2, 4, 8)),
        *(ForwardChange(f"NTK scaling by {f}", rope=f"ntk:{f}") for f in (2, 4, 8)),
        *(ForwardChange(f"rotary base {x}", rope=f"theta:{x}") for x in (10_000, 100_000, 500_000, 1_000_000)),
    ]
    return subject.forward("model", changes, lambda change: causes.get(change.name, _ROPE))


@experiment("quantised", classes=("other-forward",), forwards=4)
def quantised(subject: Subject) -> Iterator[Hypothesis]:
    """Projections rounded to INT8, FP8 or INT4, and keys and values to FP8."""
    changes = [
        *(ForwardChange(f"weights in {kind.upper()}", weights=kind) for kind in ("int8", "fp8", "int4")),
        ForwardChange("keys and values in FP8", kv_fp8=True),
    ]
    return subject.forward("model", changes, lambda change: _CACHE if change.kv_fp8 else _QUANTISED)


@experiment("dropout", classes=("trainer-noise",), forwards=1)
def dropout(subject: Subject) -> Iterator[Hypothesis]:
    """A pass in train mode, which is random: the trainer would be as far from the plain pass."""
    for one in subject.forward("model", [ForwardChange("train mode", random=True)], lambda _: _DROPOUT):
        if one.column is None:
            yield one
        else:
            ratio = subject.size("trainer", subject.plain) / max(subject.from_plain(one.column), 1e-12)
            near = 0.5 <= ratio <= 2.0 and "trainer" in subject.off
            cause = _DROPOUT if near else None
            yield Hypothesis(one.about, cause, one.column, {"ratio": ratio}, 1, one.seconds, only="trainer", like=True)


@experiment("window", classes=("positions",), forwards=6)
def window(subject: Subject) -> Iterator[Hypothesis]:
    """Attention that sees so many tokens."""
    longest = max(one.length for one in subject.sample.requests)
    changes = [ForwardChange(f"attention sees {w} tokens", window=w) for w in (16, 32, 64, 128, 256, 512, 1024, 4096)]
    return subject.forward("model", [one for one in changes if one.window < longest], lambda _: _WINDOW)
