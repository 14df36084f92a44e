"""The table that a diagnosis is made from: both log-probs of every token, and what else a dump says of it.

Shape legend: `N` tokens that count, `S` sequences, `P` prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.keys import PROMPT, RESPONSE, SIDES
from mismatch_probe.ingest.recording import Recording, lists_of
from mismatch_probe.metrics.chunks import WEIGHT_VERSION, Unusable
from mismatch_probe.probes.groups import coded
from mismatch_probe.results.finding import Finding

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST_TOKENS = 50_000
"""Signatures are fitted to at most so many tokens: whole prompts, spread evenly over the dump."""
_PER_TOKEN = ("trainer_logprobs_2", "rollout_prefill_logprobs", "trainer_entropy", "turn")
_PER_ROW = ("step", "trainer_version", "pack_index", "replica", "tags", "finish_reason")


@dataclass(frozen=True)
class Evidence:
    """Tokens of a dump that count, in the order of its sequences.

    Attributes:
        rollout: `[N]` b, nats.
        trainer: `[N]` a, nats.
        unusable: `[N]` tokens without two log-probs that can be any; signatures of values look at nothing else.
        ids: `[N]` token ids.
        position: `[N]` index in the response.
        sequence: `[N]` index of the sequence, non-decreasing.
        tokens: Further columns `[N]`, by key of the generic format.
        rows: Further columns `[S]`, by key of the generic format; labels are coded from 0, `NONE` where there is none.
        labels: The names of the codes, by key.
        prompt: `[S]` index of the prompt.
        prompt_length: `[S]` tokens.
        length: `[S]` tokens of the response.
        seen: `[N]` whether the id stands earlier in the prompt or the response.
        again: `[N]` how often the id stands earlier in the response.
        places: `[S]` file and row of each sequence.
        findings: What the accounting of the whole dump found.
        baseline: Mean |d| that rounding alone makes of the model, nats a token; None where it is not known.
    """

    rollout: Floats
    trainer: Floats
    unusable: Mask
    ids: Ints
    position: Ints
    sequence: Ints
    tokens: Mapping[str, NDArray[Any]]
    rows: Mapping[str, Ints]
    labels: Mapping[str, tuple[str, ...]]
    prompt: Ints
    prompt_length: Ints
    length: Ints
    seen: Mask
    again: Ints
    places: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    baseline: float | None = None

    def __len__(self) -> int:
        return len(self.rollout)

    @cached_property
    def usable(self) -> Mask:
        """`[N]` tokens that signatures explain."""
        return ~self.unusable

    @cached_property
    def fold(self) -> NDArray[np.int64]:
        """`[N]` 0 or 1: half of the prompts judges what is fitted to the other half."""
        order = np.random.default_rng(0).permutation(int(self.prompt.max(initial=0)) + 1)
        return np.asarray((order % 2)[self.prompt][self.sequence])

    @property
    def grid(self) -> Finding | None:
        """The first finding of a grid that is not fine beside the gap."""
        grids = (one for one in self.findings if one.code == "coarse-grid" and one.severity != "info")
        return next(grids, None)

    @cached_property
    def start(self) -> Ints:
        """`[S+1]` first token of each sequence, and N."""
        return np.searchsorted(self.sequence, np.arange(len(self.prompt) + 1))

    @cached_property
    def from_end(self) -> Ints:
        """`[N]` tokens of the response after each."""
        return np.asarray(self.length[self.sequence] - 1 - self.position)

    def of_sequence(self, values: NDArray[Any]) -> NDArray[Any]:
        """`[N]` of values `[S]`."""
        return values[self.sequence]

    def beside(self, steps: int | Ints) -> tuple[Ints, Mask]:
        """For each token the index of the token `steps`, or `[N]` of them, after it in its response, and whether there
        is one.
        """
        index = np.arange(len(self)) + steps
        inside = (index >= 0) & (index < len(self))
        index = np.where(inside, index, 0)
        inside &= (self.sequence[index] == self.sequence) & (self.position[index] == self.position + steps)
        return index, np.asarray(inside)


def place_of(file: str, row: int) -> str:
    """The name of a sequence in `Evidence.places`."""
    return f"{file}:{row}"


def read_evidence(recording: Recording, most: int = MOST_TOKENS, baseline: float | None = None) -> Evidence:
    """The tokens of a dump that has log-probs of both sides.

    Args:
        recording: The dump.
        most: Of more tokens than these some prompts are left out.
        baseline: Mean |d| that rounding alone makes of the model, nats a token.
    """
    keys = set(recording.recorded.file.keys)
    kept = _kept_prompts(recording, most)
    token_keys = [key for key in _PER_TOKEN if key in keys] + ([WEIGHT_VERSION] if WEIGHT_VERSION in keys else [])
    row_keys = [key for key in _PER_ROW if key in keys]
    masked = ["loss_mask"] if recording.masked else []
    tokens: dict[str, list[NDArray[Any]]] = {key: [] for key in (*SIDES, RESPONSE, *token_keys)}
    rows: dict[str, list[Any]] = {key: [] for key in row_keys}
    found: dict[str, list[Any]] = {key: [] for key in ("prompt", "prompt_length", "length")}
    position: list[Ints] = []
    seen: list[Mask] = []
    again: list[Ints] = []
    sequence: list[Ints] = []
    places: list[str] = []
    n = 0
    for batch in recording.batches(
        [PROMPT, RESPONSE, *SIDES, *token_keys, *row_keys, *masked, "prompt_id", "file", "row"]
    ):
        lists = {key: lists_of(batch.column(key)) for key in (PROMPT, *tokens, *masked)}
        columns = {key: batch.column(key).to_pylist() for key in (*row_keys, "prompt_id", "file", "row")}
        for row in range(batch.num_rows):
            if kept is not None and columns["prompt_id"][row] not in kept:
                continue
            counts = lists["loss_mask"][row].astype(np.bool_) if masked else slice(None)
            ids = lists[RESPONSE][row]
            for key, parts in tokens.items():
                parts.append(lists[key][row][counts])
            for key in row_keys:
                rows[key].append(columns[key][row])
            position.append(np.arange(len(ids))[counts])
            earlier = _earlier(ids)
            again.append(earlier[counts])
            seen.append(((earlier > 0) | np.isin(ids, lists[PROMPT][row]))[counts])
            sequence.append(np.full(len(position[-1]), n))
            found["prompt"].append(columns["prompt_id"][row])
            found["prompt_length"].append(len(lists[PROMPT][row]))
            found["length"].append(len(ids))
            places.append(place_of(columns["file"][row], columns["row"][row]))
            n += 1
    flat = {key: np.concatenate(parts) for key, parts in tokens.items()}
    b, a = (np.asarray(flat.pop(side), np.float64) for side in SIDES)
    at, of = np.concatenate(position), np.concatenate(sequence)
    why = Unusable.of(b, a, of, at, flat.get(WEIGHT_VERSION))
    codes = {key: coded(key, values) for key, values in rows.items()}
    return Evidence(
        rollout=b,
        trainer=a,
        unusable=why.any,
        ids=np.asarray(flat.pop(RESPONSE), np.int64),
        position=at,
        sequence=of,
        tokens=flat,
        rows={key: values for key, (values, _) in codes.items()},
        labels={key: labels for key, (_, labels) in codes.items() if labels},
        prompt=np.unique(np.array(found["prompt"], dtype=object).astype(str), return_inverse=True)[1],
        prompt_length=np.array(found["prompt_length"], np.int64),
        length=np.array(found["length"], np.int64),
        seen=np.concatenate(seen),
        again=np.concatenate(again),
        places=tuple(places),
        findings=recording.recorded.file.findings,
        baseline=baseline,
    )


def _kept_prompts(recording: Recording, most: int) -> frozenset[str] | None:
    """Prompts with at most so many tokens together; None for all."""
    facts = recording.recorded.file
    if facts.n_tokens <= most:
        return None
    names = list(
        dict.fromkeys(name for batch in recording.batches(["prompt_id"]) for name in batch.column(0).to_pylist())
    )
    n = max(2, len(names) * most // facts.n_tokens)
    return frozenset(names[int(i)] for i in np.linspace(0, len(names) - 1, min(n, len(names))))


def _earlier(ids: NDArray[Any]) -> Ints:
    """`[T]` how often each id stands before it in its list."""
    order = np.argsort(ids, kind="stable")
    first = np.flatnonzero(np.diff(ids[order], prepend=-1))
    rank = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
    found = np.empty(len(ids), np.int64)
    found[order] = rank
    return found
