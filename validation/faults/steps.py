"""Many steps: the trainer is updated on other text, and the engine does not follow as it should."""

from __future__ import annotations

from collections.abc import Callable

from validation.faults.bench import Bench, Place, joined, paired, stepped
from validation.faults.catalog import ROTARY, Made, fault
from validation.faults.edits import Row
from validation.faults.other_weights import LAYERS, updated
from validation.faults.record import Recording

_SMALL = (
    ("chain", "bfloat16"),
    ("mixture", "bfloat16"),
    ("chain", "float16"),
    ("mixture", "float32"),
    ("chain", "float32"),
)
Named = Callable[[int], str]


def n_steps(place: Place) -> int:
    return 5 if place.model == "smollm2" else 8


def run(bench: Bench, place: Place, trainer: Named, engine: Named, *, reference: bool = False) -> Made:
    """A run: at step t the trainer has the weights `trainer(t)`, the engine `engine(t)`."""
    count = n_steps(place)
    recordings = [_step(place, t, engine(t)) for t in range(count)]
    bench.need(recordings)
    parts: list[list[Row]] = []
    for t, recording in enumerate(recordings):
        rows = stepped(bench.rows(recording, place.view(weights=trainer(t))), t)
        if reference:
            rows = paired(rows, "ref_logprobs", bench.score(recording, place.view()))
        parts.append(rows)
    return Made(joined(parts), trainer(count - 1), engine(count - 1))


def _step(place: Place, t: int, weights: str) -> Recording:
    count = 12 if place.model == "smollm2" else 20
    return place.recording(weights=weights, count=count, first=count * t, seed=1000 * (t + 1))


def trained(place: Place, size: str) -> Named:
    return lambda t: updated(place.model, size, t)


@fault("restored-first-checkpoint", "falls-behind", "hi", "lo", combinations=ROTARY)
def _restored(bench: Bench, place: Place, strength: str) -> Made:
    return run(bench, place, trained(place, strength), lambda t: "")


def _adapter(size: float) -> Named:
    return lambda t: f"lora:8:{round(size * t, 6)}" if t else ""


@fault("adapter-ignored-steps", "falls-behind", 0.02, 0.04, combinations=ROTARY)
def _ignored(bench: Bench, place: Place, strength: float) -> Made:
    return run(bench, place, _adapter(strength), lambda t: "")


@fault("lora-scale", "falls-behind", 0.02, 0.04, combinations=ROTARY)
def _scale(bench: Bench, place: Place, strength: float) -> Made:
    return run(bench, place, _adapter(strength), _adapter(2 * strength))


# Merging again rounds anew, which here adds hardly more at the last step than at the first.
@fault("merged-adapter-drift", "falls-behind", 1000, 3000, combinations=_SMALL, also=("other-forward",))
def _merged(bench: Bench, place: Place, strength: int) -> Made:
    def engine(t: int) -> str:
        return f"merge:8:0.05:{strength * t // 7}"

    return run(bench, place, lambda t: "lora:8:0.05", engine)


@fault("partial-load-at-update", "step-change", 1, 2, combinations=ROTARY)
def _partial(bench: Bench, place: Place, strength: int) -> Made:
    middle = LAYERS[place.model] // 2

    def engine(t: int) -> str:
        return f"{updated(place.model, 'lo', t)}|lost:{middle}:{middle + strength}" if t else ""

    return run(bench, place, trained(place, "lo"), engine)


@fault("resume-serves-reference", "one-step", "ref", "plain", combinations=ROTARY)
def _resumed(bench: Bench, place: Place, strength: str) -> Made:
    restart = n_steps(place) - 2

    def engine(t: int) -> str:
        return "" if t == restart else updated(place.model, "hi", t)

    return run(bench, place, trained(place, "hi"), engine, reference=strength == "ref")


@fault("async-staleness", "weight-lag", "hi", "lo", combinations=ROTARY)
def _lag(bench: Bench, place: Place, strength: str) -> Made:
    newest = n_steps(place) - 1
    steps = range(4, newest + 1)
    count = 16 if place.model == "smollm2" else 8
    recordings = {
        (step, lag): place.recording(
            weights=updated(place.model, strength, step - lag),
            count=count,
            first=(4 * step + lag) * count,
            seed=step * 90,
        )
        for step in steps
        for lag in range(4)
    }
    bench.need(recordings.values())
    rows = [
        row.with_keys(step=step, trainer_version=step, weight_version=[step - lag] * len(row.response))
        for (step, lag), recording in recordings.items()
        for row in bench.rows(recording, place.view(weights=updated(place.model, strength, step)))
    ]
    return Made(rows, updated(place.model, strength, newest), updated(place.model, strength, newest))


@fault("switch-within-response", "weight-lag", "hi:3", "hi:2", combinations=ROTARY)
def _switch(bench: Bench, place: Place, strength: str) -> Made:
    size, lag = strength.split(":")
    old, new = updated(place.model, size, 4 - int(lag)), updated(place.model, size, 4)
    recording = place.recording(weights=old, switch=new, switch_at=20)
    rows = [
        row.with_keys(trainer_version=4, weight_version=[4 if x else 4 - int(lag) for x in one.switched])
        for row, one in zip(bench.rows(recording, place.view(weights=new)), bench.recorded(recording), strict=True)
    ]
    return Made(rows, new, new)


@fault("unknown-drift", "cannot-tell", 0.1, 0.2, combinations=_SMALL, also=("other-forward",))
def _drift(bench: Bench, place: Place, strength: float) -> Made:
    sizes = (0.2, 0.5, 0.3, 0.8, 0.6, 1.0, 0.5, 0.9)
    return run(bench, place, lambda t: "", lambda t: f"noise:{round(strength * sizes[t], 4)}:{t}")
