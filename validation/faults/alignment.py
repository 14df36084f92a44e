"""Faults of rows that do not line up: shifts, other splits, placeholders, masks, other groups of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from validation.faults import edits
from validation.faults.bench import Bench, Place
from validation.faults.catalog import ROTARY, Made, fault
from validation.faults.edits import Row


def plain(bench: Bench, place: Place) -> list[Row]:
    return bench.rows(place.recording(), place.view())


@fault("shift-by-one", "shift", "b:1", "b:-1", "a:1", "b:2", "b:-2", "b:1:0.3", physical=False)
def _shift(bench: Bench, place: Place, strength: str) -> list[Row]:
    side, by, *share = strength.split(":")
    rows = plain(bench, place)
    return edits.some(
        rows,
        float(share[0]) if share else 1.0,
        lambda row: row.edited(side, lambda x: edits.shifted(x, int(by))),  # type: ignore[arg-type]
    )


@fault("packed-labels-shifted", "shift", "4:one", "2:one", "4:growing", "8:one", physical=False)
def _packed_labels(bench: Bench, place: Place, strength: str) -> list[Row]:
    pack, how = strength.split(":")
    return edits.relabelled_packs(plain(bench, place), int(pack), growing=how == "growing")


@fault("retokenised", "retokenised", "a:1", "a:0.5", "b:0.5", "a:0.25", physical=False)
def _retokenised(bench: Bench, place: Place, strength: str) -> list[Row]:
    side, share = strength.split(":")
    draw = edits.rng(5)

    def edit(row: Row) -> Row:
        return edits.retokenised(row, int(draw.integers(2, max(3, len(row.a) - 4))), side)  # type: ignore[arg-type]

    return edits.some(plain(bench, place), float(share), edit)


@fault("eos-placeholder", "end-placeholders", 0.0, -9999.0, 1.0, "nan", physical=False, also=("missing-values",))
def _eos(bench: Bench, place: Place, strength: Any) -> list[Row]:
    return [edits.last(row, 1, float(strength)) for row in plain(bench, place)]


@fault("padding-counted", "end-placeholders", "0:3", "0:6", "1:4", "-9999:3")
def _padding_counted(bench: Bench, place: Place, strength: str) -> list[Row]:
    # Padding stays in the response, and the trainer scores it as it scores any token.
    value, count = strength.split(":")
    recording = place.recording()
    pad = 0 if place.model != "smollm2" else 2
    recorded = bench.recorded(recording)
    longer = [(row.prompt, [*row.response, *[pad] * (int(count) + i % 3)]) for i, row in enumerate(recorded)]
    scores = bench.score_ids(place.model, f"{recording.key}-pad{pad}-{count}", place.view(), longer)
    return [
        Row(
            prompt,
            response,
            np.array([*row.logprobs, *[float(value)] * (len(response) - len(row.logprobs))]),
            a,
            {"prompt_id": row.prompt_id, "finish_reason": row.finish_reason},
        )
        for row, (prompt, response), a in zip(recorded, longer, scores, strict=True)
    ]


@fault("missing-logprobs", "placeholders", "0:0.05", "0:0.2", "1:0.05", "-9999:0.02", "0:0.01", physical=False)
def _missing(bench: Bench, place: Place, strength: str) -> list[Row]:
    value, share = strength.split(":")
    rows = plain(bench, place)
    return [edits.scattered(row, float(share), float(value), 100 + i) for i, row in enumerate(rows)]


def _conversations(bench: Bench, place: Place, strip: float = 0.0) -> tuple[list[Row], Any]:
    tokens = 20 if place.model == "smollm2" else 24
    count = 48 if place.model == "smollm2" else 64
    recording = place.recording(turns=3, tokens=tokens, count=count, strip=strip, prefill=None if strip else "")
    recorded = bench.recorded(recording)
    rows = [
        row.with_keys(loss_mask=one.sampled, turn=one.turn)
        for row, one in zip(bench.rows(recording, place.view()), recorded, strict=True)
    ]
    return rows, recorded


@fault("tool-tokens-zero", "placeholders", "all", "half", combinations=ROTARY, also=("environment-tokens",))
def _tool_zero(bench: Bench, place: Place, strength: str) -> list[Row]:
    rows, _ = _conversations(bench, place)
    counted = [row.with_keys(loss_mask=np.ones(len(row.a), int)) for row in rows]
    chosen = (
        counted
        if strength == "all"
        else [c if i % 2 else r for i, (r, c) in enumerate(zip(rows, counted, strict=True))]
    )
    for row in chosen:
        del row.keys["turn"]
    return chosen


@fault("environment-tokens-in-mask", "environment-tokens", "all", "half", combinations=ROTARY)
def _environment(bench: Bench, place: Place, strength: str) -> list[Row]:
    # The engine's prefill gave them log-probs.
    rows, recorded = _conversations(bench, place)
    found = []
    for i, (row, one) in enumerate(zip(rows, recorded, strict=True)):
        keys = {name: value for name, value in row.keys.items() if name != "turn"}
        b = np.where(np.array(one.sampled) == 1, row.b, np.array(one.prefill))
        counted = strength == "all" or i % 2 == 1
        keys["loss_mask"] = np.ones(len(b), int) if counted else np.array(one.sampled)
        found.append(replace(row, b=b, keys=keys))
    return found


@fault("rewritten-history", "later-turns", 1.0, 0.5, 0.8, combinations=ROTARY)
def _history(bench: Bench, place: Place, strength: float) -> Made:
    rows, _ = _conversations(bench, place, strip=strength)
    return Made(rows, note="share of each response that the engine's later turns no longer see")


@fault("null-at-certain-tokens", "missing-values", 0.01, 0.001, 0.05, physical=False)
def _null(bench: Bench, place: Place, strength: float) -> list[Row]:
    return [edits.null_where_certain(row, strength) for row in plain(bench, place)]


@fault("nan-row", "missing-values", 0.1, 0.3, 0.05)
def _nan_row(bench: Bench, place: Place, strength: float) -> list[Row]:
    # From some token on logits are NaN, and every token is token 0.
    recording = place.recording()
    recorded = bench.recorded(recording)
    chosen = set(edits.rng(9).permutation(len(recorded))[: round(strength * len(recorded))].tolist())
    begin = [int(edits.rng(9, i).integers(1, max(2, len(row.response)))) for i, row in enumerate(recorded)]
    ids = [
        [*row.response[: begin[i]], *[0] * (len(row.response) - begin[i])] if i in chosen else row.response
        for i, row in enumerate(recorded)
    ]
    sequences = [(row.prompt, response) for row, response in zip(recorded, ids, strict=True)]
    scores = bench.score_ids(place.model, f"{recording.key}-nan{strength}", place.view(), sequences)
    rows = []
    for i, (row, (prompt, response), a) in enumerate(zip(recorded, sequences, scores, strict=True)):
        b = np.array(row.logprobs)
        if i in chosen:
            b[begin[i] :] = np.nan
        rows.append(Row(prompt, response, b, a, {"prompt_id": row.prompt_id, "finish_reason": row.finish_reason}))
    return rows


@fault("recomputed", "recomputed", "same", "fp32", physical=False)
def _recomputed(bench: Bench, place: Place, strength: str) -> Made:
    dtype = "float32" if strength == "fp32" else place.dtype
    rows = bench.rows(place.recording(), place.view(dtype=dtype))
    return Made([edits.recomputed(row) for row in rows], trainer_dtype=dtype)


@fault("length-capped-tail", "capped-tail", 4, 2, 8, physical=False)
def _capped(bench: Bench, place: Place, strength: int) -> Made:
    other = bench.score(place.recording(), place.view(dropout=0.3, seed=3))
    rows = plain(bench, place)
    changed = [edits.tail_from(row, b, strength) for row, b in zip(rows, other, strict=True)]
    return Made(changed, note="those tokens' rollout log-probs are of a network with dropout .3")


@fault("replica-topology", "replica", 4, 8, 3, physical=False)
def _replica(bench: Bench, place: Place, strength: int) -> list[Row]:
    return [
        (edits.inflated(row, strength) if i % 4 == 2 else row).with_keys(replica=f"engine-{i % 4}")
        for i, row in enumerate(plain(bench, place))
    ]
