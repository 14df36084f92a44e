"""The same weights, and another forward pass at the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from validation.faults.bench import Bench, Place, paired
from validation.faults.catalog import EVERYWHERE, ROTARY, Combination, Made, fault
from validation.faults.edits import Row

_UNEVEN: tuple[Combination, ...] = (
    ("smollm2", "bfloat16"),
    ("mixture", "bfloat16"),
    ("absolute", "bfloat16"),
    ("mixture", "float32"),
    ("absolute", "float32"),
    ("smollm2", "float32"),
)
_ABSOLUTE: tuple[Combination, ...] = (("absolute", "bfloat16"), ("absolute", "float16"), ("absolute", "float32"))


def _long(place: Place, **options: Any) -> Any:
    count = 40 if place.model == "smollm2" else 64
    return place.recording(**({"count": count, "tokens": 96} | options))


@fault("dropout", "other-forward", 0.1, 0.05, 0.2)
def _dropout(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(), place.view(dropout=strength))


@fault("coarser-rounding", "other-forward", 3, 4, 2)
def _coarser(bench: Bench, place: Place, strength: int) -> Made:
    rows = bench.rows(place.recording(), place.view(bits=strength))
    return Made(rows, note="mantissa bits of the trainer's residual stream")


@fault("soft-cap-or-sink-missing", "other-forward", "sink:2", "sink:4", "sink:3", combinations=ROTARY)
def _sink(bench: Bench, place: Place, strength: str) -> list[Row]:
    return bench.rows(place.recording(), place.view(sink=float(strength.split(":")[1])))


@fault("soft-cap", "other-forward", 20, 12, combinations=ROTARY, also=("temperature",))
def _cap(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(), place.view(cap=float(strength)))


@fault("dropout-two-passes", "trainer-noise", 0.1, 0.05, 0.2)
def _two_passes(bench: Bench, place: Place, strength: float) -> list[Row]:
    recording = place.recording()
    again = bench.score(recording, place.view(dropout=strength, seed=1))
    return paired(bench.rows(recording, place.view(dropout=strength)), "trainer_logprobs_2", again)


_ROUNDED = tuple(c for c in EVERYWHERE if c[1] != "float32")


@fault("other-kernels", "trainer-noise", "eager", "eager-single", combinations=_ROUNDED, also=("rounding",))
def _kernels(bench: Bench, place: Place, strength: str) -> Made:
    # The trainer's second pass rounds elsewhere, as that of an update with another batch size does on a GPU.
    recording = place.recording()
    again = bench.score(recording, place.view(attention="eager", batch=1 if strength == "eager-single" else 8))
    rows = paired(bench.rows(recording, place.view()), "trainer_logprobs_2", again)
    return Made(rows, note="the second pass with another implementation of attention")


@fault("rope-long-positions", "positions", "clip:48", "half:40", "clip:64", "half:64", combinations=ROTARY)
def _rope(bench: Bench, place: Place, strength: str) -> list[Row]:
    return bench.rows(_long(place), place.view(positions=strength))


@fault("bf16-position-ids", "positions", 0, 1, combinations=ROTARY)
def _bf16(bench: Bench, place: Place, strength: int) -> Made:
    recording = _long(place, long=True, count=32, first=32 * strength)
    return Made(bench.rows(recording, place.view(positions="bf16")), note="the strength is the set of prompts")


@fault(
    "buffers-lost", "positions", "theta:1000000", "lost:0", "theta:1000", combinations=ROTARY, also=("other-forward",)
)
def _buffers(bench: Bench, place: Place, strength: str) -> list[Row]:
    return bench.rows(_long(place), place.view(rope=strength))


@fault("rope-scaling", "positions", "divide:2", "yarn:4", "divide:1.25", combinations=ROTARY, also=("other-forward",))
def _scaling(bench: Bench, place: Place, strength: str) -> list[Row]:
    change = {"rope" if strength.startswith("yarn") else "positions": strength}
    return bench.rows(_long(place), place.view(**change))


@fault("window-missing", "positions", 32, 48, 24)
def _window(bench: Bench, place: Place, strength: int) -> list[Row]:
    return bench.rows(_long(place), place.view(window=strength))


@fault("packing-leak", "packing", 4, 2, 8)
def _leak(bench: Bench, place: Place, strength: int) -> list[Row]:
    return packs(bench.rows(place.recording(), place.view(layout="packed-leak", batch=strength)), strength)


def packs(rows: list[Row], size: int) -> list[Row]:
    return [row.with_keys(pack_id=i // size, pack_index=i % size) for i, row in enumerate(rows)]


@fault("left-padding-positions", "padding", 8, 16, 4, 32, combinations=_ABSOLUTE, per_place=4)
def _left(bench: Bench, place: Place, strength: int) -> Made:
    rows = bench.rows(place.recording(), place.view(layout="left-unnumbered", batch=strength))
    return Made(rows, note="batches of so many rows, in the order of the file")


@fault("left-padding-attended", "padding", 8, 16, combinations=_UNEVEN)
def _attended(bench: Bench, place: Place, strength: int) -> Made:
    rows = bench.rows(place.recording(), place.view(layout="left-attended", batch=strength))
    return Made(rows, note="batches of so many rows, in the order of the file")


def by_tag(
    bench: Bench, place: Place, strength: str, everywhere: Mapping[str, Any] | None = None, **change: Any
) -> list[Row]:
    """The trainer changed in all rows, or in every second one."""
    recording, same = place.recording(), dict(everywhere or {})
    wrong = bench.rows(recording, place.view(**same, **change))
    if strength != "tagged":
        return wrong
    right = bench.rows(recording, place.view(**same))
    return [
        (w if i % 2 else r).with_keys(tags="chat" if i % 2 else "text")
        for i, (r, w) in enumerate(zip(right, wrong, strict=True))
    ]


_WITH_BOS = tuple(c for c in (*EVERYWHERE, ("chain", "float32")) if c[0] != "smollm2")


# Without a tag it is told by first tokens that are further off than later ones; in small models they need not be.
@fault("missing-bos", "prompts-differ", "all", "tagged", combinations=_WITH_BOS, also=("other-forward",))
def _bos(bench: Bench, place: Place, strength: str) -> list[Row]:
    return by_tag(bench, place, strength, drop=1)


_PREFIX = {
    "smollm2": ("You are a helpful assistant.\n\n", "Answer in one word, in French.\n"),
    "chain": ("7*3;", "?"),
    "mixture": ("See also: ", "class "),
    "absolute": ("See also: ", "class "),
}


@fault("other-system-text", "prompts-differ", "all", "tagged", "other", also=("other-forward",))
def _system(bench: Bench, place: Place, strength: str) -> Made:
    prefix = _PREFIX[place.model][strength == "other"]
    return Made(by_tag(bench, place, strength, prefix=prefix), note=f"the trainer's prompts begin with {prefix!r}")
