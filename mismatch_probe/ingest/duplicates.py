"""Sequences that stand in a dump more than once.

Short answers repeat by chance, and their own log-probs say how often: another sample of the prompt is the same with a
probability of exp(Σ log μ(y_t)). A copy is one where that is below e⁻²⁵: among a million sequences, 16 of each prompt,
chance makes one in fewer than one of a thousand dumps. Without log-probs a copy has more than 16 tokens. Greedy
sampling, and engines that share a seed, make copies too.

Memory is 32 bytes a row. Shape legend: `R` rows of a block, `S` rows of the dump.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.blocks import MOST_PLACES, Block, Ints
from mismatch_probe.ingest.chunk import Lists
from mismatch_probe.metrics.chunks import Side
from mismatch_probe.results.finding import Finding

_BY_CHANCE = -25.0
_SHORT = 16
# A smaller share of copies is a note.
_MANY = 0.01


class Duplicates:
    """Rows with prompt and response ids of an earlier row of their step, or of the dump where there are no steps."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._file: list[Ints] = []
        self._row: list[Ints] = []
        self._digest: list[Ints] = []
        self._rare: list[Ints] = []

    def add(self, block: Block, sound: Mapping[Side, NDArray[np.bool_]]) -> None:
        """Takes in a block.

        Args:
            block: The rows.
            sound: `[n]` by recorded side, which of its values are log-probs.
        """
        self._digest.append(_digests(block))
        self._row.append(block.rows)
        self._file.append(self._file_index(block))
        self._rare.append(_rare(block, sound))

    def _file_index(self, block: Block) -> Ints:
        """`[R]` index of each row's file."""
        starts = np.flatnonzero(np.append(True, block.files[1:] != block.files[:-1]))
        index = np.empty(len(block.rows), np.int64)
        for start in starts.tolist():
            if not self._files or self._files[-1] != block.files[start]:
                self._files.append(str(block.files[start]))
            index[start:] = len(self._files) - 1
        return index

    def finding(self) -> Finding | None:
        """What is told of the copies, None without any."""
        if not self._digest:
            return None
        columns = (self._digest, self._row, self._file, self._rare)
        digest, rows, file, rare = (np.concatenate(column) for column in columns)
        order = np.argsort(digest, kind="stable")
        again = order[1:][digest[order[1:]] == digest[order[:-1]]]
        copies = np.sort(again[rare[again] == 1])
        if not len(copies):
            return None
        first = dict(zip(digest[order[::-1]].tolist(), order[::-1].tolist(), strict=True))
        groups = np.unique(digest[copies], return_counts=True)[1]

        def place(row: int) -> str:
            return f"{self._files[file[row]]}:{rows[row]}"

        share = len(copies) / len(digest)
        return Finding(
            code="duplicated-sequences",
            severity="warn" if share >= _MANY else "note",
            values={
                "n": len(copies),
                "share": share,
                "n_total": len(digest),
                "n_sequences": len(groups),
                "most": 1 + int(groups.max()),
                "n_by_chance": len(again) - len(copies),
                "places": tuple(f"{place(row)} = {place(first[digest[row]])}" for row in copies[:MOST_PLACES]),
            },
        )


def _digests(block: Block) -> Ints:
    """`[R]` 64 bits of each row's prompt ids, response ids and step."""
    prompts, responses = _views(block.prompts), _views(block.responses)
    digests = np.empty(len(block.rows), np.uint64)
    for row, (prompt, response, step) in enumerate(zip(prompts, responses, block.steps, strict=True)):
        digest = blake2b(prompt, digest_size=8)
        digest.update(f" {len(prompt)} {step} ".encode())
        digest.update(response)
        digests[row] = int.from_bytes(digest.digest(), "little")
    return digests.view(np.int64)


def _views(lists: Lists) -> Iterator[memoryview]:
    """The ids of each row as bytes, whatever integer they are stored as."""
    data = memoryview(np.ascontiguousarray(lists.values, "<i8").tobytes())
    ends = (np.cumsum(lists.lengths) * 8).tolist()
    return (data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _rare(block: Block, sound: Mapping[Side, NDArray[np.bool_]]) -> Ints:
    """`[R]` 1 where a second sample is not the same response by chance, 0 elsewhere."""
    rare = block.responses.lengths > _SHORT
    sides: tuple[Side, ...] = ("trainer", "rollout")
    for side in sides:  # the rollout decides where a row has both
        if (known := sound.get(side)) is not None:
            values = np.where(known, np.minimum(block.logprobs[side], 0), 0)
            total = np.bincount(block.sequence, values, minlength=len(rare))
            measured = np.bincount(block.sequence, known, minlength=len(rare)) > 0
            rare = np.where(measured, total < _BY_CHANCE, rare)
    return rare.astype(np.int64)
