"""Which recorded sequences experiments run on: so many that they suffice, those that show a fault first.

Shape legend: `N` tokens that count, `S` sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mismatch_probe.ingest.keys import PROMPT, RESPONSE, SIDES
from mismatch_probe.ingest.recording import Recording, lists_of
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Ints, Mask, place_of
from mismatch_probe.probes.groups import NONE
from mismatch_probe.types import ScoreRequest

_SHARE_SHOWING = 0.6
_RARE = 0.5
_BESIDE = ("rollout_prefill_logprobs", "trainer_logprobs_2")


@dataclass(frozen=True)
class Sample:
    """Recorded sequences that are scored again, in the order of the dump.

    Attributes:
        requests: `S`, numbered from 0.
        counts: By sequence, which response tokens count; `N` in all.
        rollout: `[N]` b, nats.
        trainer: `[N]` a, nats.
        beside: `[N]` further recorded log-probs, by key.
        shown: `[N]` tokens that show what signatures found.
        sequence: `[N]` index of the sequence.
        step: `[S]` training step, `NONE` where there is none.
        packs: Sequences of each packed row, in its order; empty where the dump does not say.
        places: `[S]` row of the dump, from 0.
    """

    requests: tuple[ScoreRequest, ...]
    counts: tuple[Mask, ...]
    rollout: Floats
    trainer: Floats
    beside: Mapping[str, Floats]
    shown: Mask
    sequence: Ints
    step: Ints
    packs: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def ids(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Prompts and responses."""
        return [(one.prompt_token_ids, one.response_token_ids) for one in self.requests]

    @property
    def n_forward(self) -> int:
        """Tokens of a forward pass, prompts included."""
        return sum(one.length for one in self.requests)

    def part(self, index: Sequence[int]) -> Sample:
        """Some sequences, in their order, numbered anew; packs are dropped."""
        kept = np.isin(self.sequence, index)
        return Sample(
            tuple(replace(self.requests[i], sequence_id=new) for new, i in enumerate(index)),
            tuple(self.counts[i] for i in index),
            self.rollout[kept],
            self.trainer[kept],
            {key: values[kept] for key, values in self.beside.items()},
            self.shown[kept],
            np.searchsorted(index, self.sequence[kept]),
            self.step[list(index)],
            (),
            tuple(self.places[i] for i in index),
        )


def read_sample(recording: Recording, evidence: Evidence, shown: Mask, most: int, block: int = 1) -> Sample:
    """Chooses sequences of a dump and reads them.

    Args:
        recording: The dump.
        evidence: What signatures were fitted to.
        shown: Of its tokens, those that show a fault.
        most: Tokens with prompts, at most; one unit is taken in any case.
        block: Neighbours that are taken together, because they were scored together; packed rows are always whole.
    """
    keys = set(recording.recorded.file.keys)
    number = {place: index for index, place in enumerate(evidence.places)}
    rows = list(_rows(recording, ["pack_id", "pack_index"], keys))
    units = _units(rows, number, block)
    n_shown = np.bincount(evidence.sequence[shown], minlength=len(evidence.prompt))
    index = _chosen(units, rows, number, n_shown, most, float(shown.mean()))
    return _read(recording, keys, rows, index, number, evidence, shown)


@dataclass(frozen=True)
class _Row:
    place: str
    length: int
    n_prompt: int
    pack: tuple[str, int] | None


def _rows(recording: Recording, wanted: Sequence[str], keys: set[str]) -> Iterator[_Row]:
    packed = set(wanted) <= keys
    for batch in recording.batches([PROMPT, RESPONSE, "file", "row", *(wanted if packed else [])]):
        prompts, responses = ([len(one) for one in lists_of(batch.column(key))] for key in (PROMPT, RESPONSE))
        columns = {key: batch.column(key).to_pylist() for key in ("file", "row", *(wanted if packed else []))}
        for i in range(batch.num_rows):
            label = columns["pack_id"][i] if packed else None
            pack = None if label is None else (str(label), int(columns["pack_index"][i]))
            place = place_of(columns["file"][i], columns["row"][i])
            yield _Row(place, prompts[i] + responses[i], prompts[i], pack)


def _units(rows: Sequence[_Row], number: Mapping[str, int], block: int) -> list[list[int]]:
    """Rows that are taken together; those without a prompt cannot be scored."""
    found: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        if row.n_prompt:
            found.setdefault(row.pack[0] if row.pack else i // block, []).append(i)
    return [unit for unit in found.values() if any(rows[i].place in number for i in unit)]


def _chosen(
    units: Sequence[Sequence[int]],
    rows: Sequence[_Row],
    number: Mapping[str, int],
    n_shown: Ints,
    most: int,
    share: float,
) -> list[int]:
    """Rows, in their order."""
    order = np.random.default_rng(0).permutation(len(units))
    showing = [sum(n_shown[number[rows[i].place]] for i in unit if rows[i].place in number) for unit in units]
    chosen: list[int] = []
    used = 0
    # Rare tokens first, those that show them most before others, then some of the rest beside them.
    rare = 0 < share < _RARE
    first = sorted((u for u in order if showing[u] > 0), key=lambda u: -showing[u]) if rare else []
    for some, limit in ((first, _SHARE_SHOWING * most), ([u for u in order if u not in set(first)], most)):
        for u in some:
            cost = sum(rows[i].length for i in units[u])
            if chosen and used + cost > limit:
                continue
            chosen += units[u]
            used += cost
    return sorted(chosen)


def _read(
    recording: Recording,
    keys: set[str],
    rows: Sequence[_Row],
    index: Sequence[int],
    number: Mapping[str, int],
    evidence: Evidence,
    shown: Mask,
) -> Sample:
    wanted = set(index)
    beside = [key for key in _BESIDE if key in keys]
    masked = ["loss_mask"] if recording.masked else []
    step = ["step"] if "step" in keys else []
    requests: list[ScoreRequest] = []
    counts: list[Mask] = []
    steps: list[int] = []
    values: dict[str, list[Floats]] = {key: [] for key in (*SIDES, *beside)}
    shows: list[Mask] = []
    at = 0
    for batch in recording.batches([PROMPT, RESPONSE, *values, *masked, *step]):
        here = [i for i in range(batch.num_rows) if at + i in wanted]
        lists = {key: lists_of(batch.column(key)) for key in (PROMPT, RESPONSE, *values, *masked)} if here else {}
        for i in here:
            response = lists[RESPONSE][i]
            use = lists["loss_mask"][i].astype(np.bool_) if masked else np.ones(len(response), np.bool_)
            requests.append(ScoreRequest(len(requests), lists[PROMPT][i].tolist(), response.tolist()))
            counts.append(use)
            steps.append(NONE if not step or (s := batch.column("step")[i].as_py()) is None else int(s))
            for key, parts in values.items():
                parts.append(np.asarray(lists[key][i], np.float64)[use])
            own = number.get(rows[at + i].place)
            none = np.zeros(int(use.sum()), np.bool_)
            shows.append(none if own is None else shown[evidence.start[own] : evidence.start[own + 1]])
        at += batch.num_rows
    flat = {key: np.concatenate(parts) for key, parts in values.items()}
    rollout, trainer = (flat.pop(side) for side in SIDES)
    lengths = [int(use.sum()) for use in counts]
    return Sample(
        tuple(requests),
        tuple(counts),
        rollout,
        trainer,
        flat,
        np.concatenate(shows),
        np.repeat(np.arange(len(lengths)), lengths),
        np.array(steps, np.int64),
        _packs([rows[i].pack for i in index]),
        tuple(index),
    )


def _packs(found: Sequence[tuple[str, int] | None]) -> tuple[tuple[int, ...], ...]:
    packs: dict[str, list[tuple[int, int]]] = {}
    for index, pack in enumerate(found):
        if pack is not None:
            packs.setdefault(pack[0], []).append((pack[1], index))
    return tuple(tuple(index for _, index in sorted(pack)) for pack in packs.values())
