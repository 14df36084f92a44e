"""The engine has other weights than the trainer, and samples from them: the same at every step and every place."""

from __future__ import annotations

import numpy as np

from validation.faults.bench import Bench, Place, paired
from validation.faults.catalog import ROTARY, Made, fault
from validation.faults.models import ModelName

# Learning rates of the updates that a trainer made, by the size of what they change.
RATES: dict[ModelName, dict[str, str]] = {
    "smollm2": {"lo": "1e-5", "hi": "4e-5"},
    "chain": {"lo": "2e-4", "hi": "1e-3"},
    "mixture": {"lo": "2e-4", "hi": "1e-3"},
}
LAYERS = {"smollm2": 30, "chain": 4, "mixture": 4}


def updated(model: ModelName, size: str, count: int) -> str:
    """The name of the weights after `count` updates; none is the checkpoint itself."""
    return f"upd:{RATES[model][size]}:{count}" if count else ""


def differing(bench: Bench, place: Place, trainer: str, engine: str, note: str = "") -> Made:
    rows = bench.rows(place.recording(weights=engine), place.view(weights=trainer))
    return Made(rows, trainer, engine, note=note)


@fault("older-weights", "other-forward", "hi:4", "lo:4", "hi:2", "lo:2", combinations=ROTARY)
def _older(bench: Bench, place: Place, strength: str) -> Made:
    size, count = strength.split(":")
    return differing(bench, place, updated(place.model, size, int(count)), "")


@fault("adapter-ignored", "other-forward", 0.05, 0.1, 0.2, combinations=ROTARY)
def _adapter(bench: Bench, place: Place, strength: float) -> Made:
    return differing(bench, place, f"lora:8:{strength}", "")


@fault("partial-load", "other-forward", 0.5, 0.75, combinations=ROTARY)
def _partial(bench: Bench, place: Place, strength: float) -> Made:
    new = updated(place.model, "hi", 4)
    return differing(bench, place, new, f"{new}|old:0:{round(strength * LAYERS[place.model])}")


@fault("layer-forgotten", "other-forward", 1, 2, combinations=ROTARY)
def _forgotten(bench: Bench, place: Place, strength: int) -> Made:
    new, first = updated(place.model, "hi", 4), LAYERS[place.model] // 2
    count = strength * (4 if place.model == "smollm2" else 1)
    return differing(bench, place, new, f"{new}|old:{first}:{first + count}", f"{count} layers")


@fault("wrong-mapping", "other-forward", "swap", "keys", "late", combinations=ROTARY)
def _mapping(bench: Bench, place: Place, strength: str) -> Made:
    middle = LAYERS[place.model] // 2
    if strength == "late" and place.model == "mixture":
        return differing(bench, place, "", f"experts:{LAYERS[place.model] - 1}", "experts of the last layer by one on")
    engine = {
        "swap": f"swap:{middle}:{middle + 1}",
        "keys": f"keys:{middle}",
        "late": f"keys:{LAYERS[place.model] - 1}",
    }
    return differing(bench, place, "", engine[strength])


@fault("quantised-weights", "other-forward", "int4", "fp8", "int4row", combinations=ROTARY)
def _quantised(bench: Bench, place: Place, strength: str) -> Made:
    return differing(bench, place, "", strength, "round to nearest")


@fault("fp8-cache", "other-forward", "short", "long", combinations=ROTARY[:5])
def _cache(bench: Bench, place: Place, strength: str) -> Made:
    long = {"long": True, "count": 24} if strength == "long" else {}
    return Made(bench.rows(place.recording(kv_cache="fp8", **long), place.view()), note="kv_cache_dtype=fp8 in vLLM")


def _some(bench: Bench, place: Place, strength: str, *, prefill: bool) -> Made:
    # As far from prefill as was reported, 100 to 670 times rounding; a deep network needs less noise for it.
    number = int(strength.removeprefix("x"))
    size = (0.1, 0.2, 0.15)[number - 1] if place.model == "smollm2" else (0.4, 0.8, 0.6)[number - 1]
    right, wrong = (place.recording(weights=name, prefill="") for name in ("", f"noise:{size}:1"))
    bench.need([right, wrong])
    both = []
    for recording in (right, wrong):
        rows = bench.rows(recording, place.view())
        if prefill:
            values = [np.array(row.prefill) for row in bench.recorded(recording)]
            rows = paired(rows, "rollout_prefill_logprobs", values)
        both.append(rows)
    rows = [bad if i % 13 in (3, 9) else good for i, (good, bad) in enumerate(zip(*both, strict=True))]
    return Made(rows, engine=f"noise:{size}:1", note="15 % of the sequences were decoded with noise on the weights")


@fault("decode-differs-from-prefill", "decode-prefill", "x1", "x2", "x3", combinations=ROTARY)
def _decode(bench: Bench, place: Place, strength: str) -> Made:
    return _some(bench, place, strength, prefill=True)


@fault("decode-differs-from-prefill-unseen", "some-sequences", "x1", "x2", "x3", combinations=ROTARY)
def _decode_unseen(bench: Bench, place: Place, strength: str) -> Made:
    return _some(bench, place, strength, prefill=False)


@fault("stale-prefix-cache", "repeated-prompts", "hi:4", "hi:2", combinations=ROTARY)
def _stale(bench: Bench, place: Place, strength: str) -> Made:
    size, count = strength.split(":")
    new, number = updated(place.model, size, int(count)), 12 if place.model == "smollm2" else 24
    before = place.recording(long=True, count=number)
    again = place.recording(long=True, count=number, weights=new, stale="", seed=500)
    others = place.recording(long=True, count=number, first=number, weights=new, seed=900)
    bench.need([before, again, others])
    first = [row.with_keys(step=0) for row in bench.rows(before, place.view())]
    pairs = zip(bench.rows(again, place.view(weights=new)), bench.rows(others, place.view(weights=new)), strict=True)
    return Made([*first, *(row.with_keys(step=1) for pair in pairs for row in pair)], new, new)
