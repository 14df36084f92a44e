"""Clean controls: runs in which nothing is wrong, with all that dumps can have."""

from __future__ import annotations

import numpy as np

from validation.faults.alignment import _conversations
from validation.faults.bench import Bench, Place, paired
from validation.faults.catalog import ROTARY, Combination, Made, fault
from validation.faults.edits import Row
from validation.faults.forward import packs
from validation.faults.models import MODELS
from validation.faults.other_weights import updated
from validation.faults.record import Decode
from validation.faults.steps import run, trained

_ALL: tuple[Combination, ...] = tuple((m, d) for m in MODELS for d in ("bfloat16", "float16", "float32"))  # type: ignore[misc]
_PLACES = (*ROTARY, ("absolute", "bfloat16"))


@fault("rounding", "rounding", "same", "fp32-trainer", "seed", clean=True, combinations=_ALL)
def _plain(bench: Bench, place: Place, strength: str) -> Made:
    dtype = "float32" if strength == "fp32-trainer" else place.dtype
    recording = place.recording(seed=5000) if strength == "seed" else place.recording()
    return Made(bench.rows(recording, place.view(dtype=dtype)), trainer_dtype=dtype)


@fault("rounding-batch", "rounding", 1, 16, clean=True)
def _batch(bench: Bench, place: Place, strength: int) -> list[Row]:
    return bench.rows(place.recording(), place.view(batch=strength))


@fault("rounding-temperature", "rounding", 0.7, 1.3, 0.9, clean=True, combinations=_PLACES)
def _temperature(bench: Bench, place: Place, strength: float) -> list[Row]:
    return bench.rows(place.recording(decode=Decode(temperature=strength)), place.view(temperature=strength))


@fault("rounding-top-p", "rounding", 0.9, 0.95, clean=True, combinations=_PLACES)
def _top_p(bench: Bench, place: Place, strength: float) -> Made:
    recording = place.recording(decode=Decode(top_p=strength))
    return Made(bench.rows(recording, place.view(keep=f"top_p:{strength}")), note="truncated on both sides")


@fault("rounding-penalty", "rounding", 1.1, 1.2, clean=True, combinations=_PLACES)
def _penalty(bench: Bench, place: Place, strength: float) -> Made:
    recording = place.recording(decode=Decode(repetition_penalty=strength))
    return Made(bench.rows(recording, place.view(decode=(strength, 0.0, 0.0))), note="penalty on both sides")


@fault("rounding-steps", "rounding", "hi", "lo", clean=True, combinations=ROTARY)
def _steps(bench: Bench, place: Place, strength: str) -> Made:
    return run(bench, place, trained(place, strength), trained(place, strength))


@fault("rounding-updated", "rounding", "hi:4", "lo:4", clean=True, combinations=ROTARY)
def _updated(bench: Bench, place: Place, strength: str) -> Made:
    size, count = strength.split(":")
    weights = updated(place.model, size, int(count))
    return Made(bench.rows(place.recording(weights=weights), place.view(weights=weights)), weights, weights)


@fault("rounding-turns", "rounding", "turn", "mask", clean=True, combinations=ROTARY)
def _turns(bench: Bench, place: Place, strength: str) -> list[Row]:
    rows, _ = _conversations(bench, place)
    if strength == "mask":
        for row in rows:
            del row.keys["turn"]
    return rows


@fault("rounding-packs", "rounding", 4, 8, clean=True)
def _packs(bench: Bench, place: Place, strength: int) -> list[Row]:
    return packs(bench.rows(place.recording(), place.view(layout="packed", batch=strength)), strength)


@fault("rounding-groups", "rounding", "replica", "tags", clean=True)
def _groups(bench: Bench, place: Place, strength: str) -> list[Row]:
    rows = bench.rows(place.recording(), place.view())
    if strength == "replica":
        return [row.with_keys(replica=f"engine-{i % 4}") for i, row in enumerate(rows)]
    return [row.with_keys(tags=("math", "chat", "code")[i % 3], reward=float(i % 5 == 0)) for i, row in enumerate(rows)]


@fault("rounding-columns", "rounding", "prefill", "second", clean=True, combinations=ROTARY)
def _columns(bench: Bench, place: Place, strength: str) -> list[Row]:
    recording = place.recording(prefill="")
    rows = bench.rows(recording, place.view())
    if strength == "prefill":
        values = [np.array(row.prefill) for row in bench.recorded(recording)]
        return paired(rows, "rollout_prefill_logprobs", values)
    return paired(rows, "trainer_logprobs_2", bench.score(recording, place.view()))


@fault(
    "length-product",
    "length-product",
    0,
    1,
    clean=True,
    also=("rounding",),
    combinations=(("smollm2", "bfloat16"), ("mixture", "bfloat16")),
)
def _length(bench: Bench, place: Place, strength: int) -> Made:
    recording = place.recording(count=20, first=20 * strength, tokens=320)
    return Made(bench.rows(recording, place.view()), note="long responses; the strength is the set of prompts")
