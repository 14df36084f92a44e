"""Faults in what a number means: temperature, truncation, penalties, storage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from validation.faults import edits
from validation.faults.bench import Bench, Place
from validation.faults.catalog import ROTARY, Made, fault
from validation.faults.edits import Row
from validation.faults.record import Decode

_PLACES = (*ROTARY, ("absolute", "bfloat16"))


@fault("rollout-raw-temperature", "temperature", 0.7, 1.3, 0.9, 1.5, 0.6, 1.1, combinations=_PLACES)
def _raw_temperature(bench: Bench, place: Place, strength: float) -> list[Row]:
    recording = place.recording(decode=Decode(temperature=strength), raw=True)
    return bench.rows(recording, place.view(temperature=strength))


@fault("trainer-temperature", "temperature", 0.7, 0.9, 1.1, 1.5)
def _trainer_temperature(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(), place.view(temperature=strength))


@fault("scaled-head", "temperature", 1.1, 0.85, 1.3, combinations=_PLACES)
def _scaled_head(bench: Bench, place: Place, strength: float) -> Made:
    # An engine whose head is `strength` times too large samples as one at the inverse temperature.
    recording = place.recording(decode=Decode(temperature=round(1 / strength, 6)))
    return Made(bench.rows(recording, place.view()), note="the engine's logits are so many times the trainer's")


@fault("divided-after-softmax", "scaled-logprobs", "a:0.7", "b:0.7", "a:1.5", "b:1.5", "b:0.6", combinations=_PLACES)
def _divided(bench: Bench, place: Place, strength: str) -> list[Row]:
    side, number = strength.split(":")
    temperature = float(number)
    if side == "a":
        return [edits.divided(row, "a", temperature) for row in bench.rows(place.recording(), place.view())]
    # Sampled and trained at the temperature; what the engine reports is the raw log-prob, divided.
    recording = place.recording(decode=Decode(temperature=temperature), raw=True)
    rows = bench.rows(recording, place.view(temperature=temperature))
    return [edits.divided(row, "b", temperature) for row in rows]


def _truncated(bench: Bench, place: Place, kind: str, strength: str) -> list[Row]:
    side, number = strength.split(":")
    value = int(number) if kind == "top_k" else float(number)
    recording = place.recording(decode=Decode(**{kind: value}), raw=side == "a")
    # At the trainer: the engine reports the log-probs before truncation.
    return bench.rows(recording, place.view(keep=f"{kind}:{number}" if side == "a" else ""))


@fault("top-p", "truncation", "b:0.9", "b:0.95", "a:0.9", "b:0.8", "a:0.95", combinations=_PLACES)
def _top_p(bench: Bench, place: Place, strength: str) -> list[Row]:
    return _truncated(bench, place, "top_p", strength)


@fault("min-p", "truncation", "b:0.05", "a:0.05", "b:0.1", "b:0.2", combinations=_PLACES)
def _min_p(bench: Bench, place: Place, strength: str) -> list[Row]:
    return _truncated(bench, place, "min_p", strength)


_TOP_K = {"smollm2": (20, 50, 10), "chain": (2, 3, 1), "mixture": (5, 10, 3), "absolute": (5, 10, 3)}


@fault("top-k", "truncation", "b:0", "b:1", "a:0", "b:2", combinations=_PLACES)
def _top_k(bench: Bench, place: Place, strength: str) -> Made:
    side, index = strength.split(":")
    number = max(2, _TOP_K[place.model][int(index)])
    return Made(_truncated(bench, place, "top_k", f"{side}:{number}"), note=f"k = {number}")


# So many rows of zeros have a mean mass of about .026 and .08.
_ROWS = {"smollm2": (2048, 6144), "chain": (640, 2000), "mixture": (100, 300), "absolute": (100, 300)}


@fault("padded-vocabulary", "truncation", "a:0", "b:0", "a:1", "b:1", combinations=(*_PLACES, ("smollm2", "float32")))
def _padded_vocabulary(bench: Bench, place: Place, strength: str) -> Made:
    side, index = strength.split(":")
    number = _ROWS[place.model][int(index)]
    plain, padded = (bench.rows(place.recording(), place.view(extra_rows=n)) for n in (0, number))
    note = f"{number} rows of zeros"
    if side == "a":
        return Made(padded, note=note)
    # The engine never samples a padded row, but its log-probs lack their mass.
    rows = [replace(p, b=p.b + (q.a - p.a)) for p, q in zip(plain, padded, strict=True)]
    return Made(rows, note=note)


@fault("repetition-penalty", "penalty", 1.1, 1.3, 1.2, 1.05, combinations=_PLACES)
def _repetition(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(decode=Decode(repetition_penalty=strength)), place.view())


@fault("presence-penalty", "penalty", 0.5, 1.0, 0.3, combinations=_PLACES)
def _presence(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(decode=Decode(presence_penalty=strength)), place.view())


@fault("frequency-penalty", "penalty", 0.3, 0.1, 0.6, combinations=_PLACES)
def _frequency(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(decode=Decode(frequency_penalty=strength)), place.view())


@fault("top1-instead-of-sampled", "top1-logprobs", "all", "half", physical=False)
def _top1(bench: Bench, place: Place, strength: str) -> list[Row]:
    recording = place.recording()
    rows, tops = bench.rows(recording, place.view()), [np.array(r.top) for r in bench.recorded(recording)]
    changed = [replace(row, b=top) for row, top in zip(rows, tops, strict=True)]
    return (
        changed
        if strength == "all"
        else [c if i % 2 else r for i, (r, c) in enumerate(zip(rows, changed, strict=True))]
    )


@fault("softmax-16-bit", "coarse-logprobs", "a:subtracted", "a:rounded", "a:subtracted-fp32")
def _softmax(bench: Bench, place: Place, strength: str) -> Made:
    _, kind, *wide = strength.replace("-", ":").split(":")
    dtype = "float32" if wide else place.dtype
    return Made(bench.rows(place.recording(), place.view(softmax=kind, dtype=dtype)), trainer_dtype=dtype)


@fault("rounded-storage", "coarse-logprobs", "b:bf16", "a:bf16", "b:2", "a:1", "b:1", physical=False)
def _stored(bench: Bench, place: Place, strength: str) -> list[Row]:
    side, how = strength.split(":")
    rows = bench.rows(place.recording(), place.view())
    if how == "bf16":
        return [edits.stored_bf16(row, side) for row in rows]  # type: ignore[arg-type]
    return [edits.decimals(row, side, int(how)) for row in rows]  # type: ignore[arg-type]
