"""Full rows of logits on disk: which positions of a rollout are kept, and the private file that holds them.

A rollout makes far more rows than can be kept, and how many is not known before it ends. So every position draws a
key u/w, u uniform from a seed and w its weight, and the N positions with the smallest keys stay: priority sampling
(Duffield, Lund and Thorup 2007), a streaming sample with probability proportional to w. With τ the smallest key that
was turned away, a kept position was included with probability π = min(1, w·τ). The weight is one minus the probability
of the row's likeliest token, since positions at which the model is sure hold little of any divergence. The sum of all
weights, kept or not, is known, so a sum over all positions is estimated by the ratio Σ(y/π) / Σ(w/π) times it, which
does not suffer from how many positions happened to be likely ones.

The file is a header and N slots of a fixed size, written and read in place: no more than a row is ever in memory, and
another process can read what the engine's own process wrote.

Shape legend: `V` vocabulary.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import TableError

# However sure the model is, a fault could hide there: such a position still gets a tenth of the largest weight.
LEAST_WEIGHT = 0.1
_HEADER = np.dtype(
    [("magic", "S8"), ("vocabulary", "<i8"), ("slots", "<i8"), ("threshold", "<f8"), ("total_weight", "<f8")]
)
_SLOT = np.dtype(
    [("sequence_id", "<i8"), ("position", "<i8"), ("key", "<f8"), ("weight", "<f8"), ("stands_for", "<f8")]
)
_MAGIC = b"MPROWS01"


@dataclass(frozen=True)
class KeptRow:
    """A position whose row is in the file.

    Attributes:
        sequence_id: The sequence.
        position: Index in the response.
        slot: Where its row lies.
        weight: w.
        stands_for: How many positions it stands for: 1/π, scaled so that Σ w·stands_for is the sum of all weights.
    """

    sequence_id: int
    position: int
    slot: int
    weight: float
    stands_for: float


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) from a request's seed and a position: the same in every dtype, engine and batch."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64


def file_bytes(rows: int, vocabulary: int) -> int:
    """Size of a file of so many rows."""
    return _HEADER.itemsize + rows * (_SLOT.itemsize + 4 * vocabulary)


class RowWriter:
    """Keeps the `capacity` positions with the smallest keys; made by the process that sees the rows."""

    def __init__(self, path: Path, capacity: int) -> None:
        """Makes the file, readable by its owner alone, or empties it: a pass that runs again starts anew."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._capacity = capacity
        self._vocabulary = 0
        self._threshold = math.inf  # smallest key that was turned away
        self._total_weight = 0.0
        self._counted: dict[int, int] = {}  # last position of each sequence that was
        self._facts: dict[int, NDArray[Any]] = {}
        self._slots: dict[tuple[int, int], int] = {}
        self._largest: list[tuple[float, tuple[int, int]]] = []  # heap of (−key, position)

    def admit(
        self, sequence_id: int, position: int, u: float, weight: float, stands_for: float = math.nan
    ) -> int | None:
        """Counts a position and decides whether its row is kept.

        Args:
            sequence_id: The sequence.
            position: Index in the response.
            u: What `uniform` gives for it; 0 keeps it whatever else comes.
            weight: In (0, 1].
            stands_for: For a position that another file chose, how many it stands for there.

        Returns:
            The slot that its row goes to, None for nowhere. A position that comes again (a prompt in several chunks
            shows rows before its last) keeps its slot and the weight that it came in with, which decided.
        """
        name = (sequence_id, position)
        # A preempted request computes its prompt and response again, in chunks that show earlier positions.
        if position > self._counted.get(sequence_id, -1):
            self._counted[sequence_id] = position
            self._total_weight += weight
        slot = self._slots.get(name)
        if slot is None:
            key = u / weight
            slot = self._free_slot(key)
            if slot is not None:
                self._slots[name] = slot
                self._facts[slot] = np.array((sequence_id, position, key, weight, stands_for), dtype=_SLOT)
                heapq.heappush(self._largest, (-key, name))
        self._write_header()
        return slot

    def put(self, slot: int, row: NDArray[np.float32]) -> None:
        """Writes the row `[V]` of logits that goes to a slot."""
        if self._vocabulary not in (0, len(row)):
            raise ValueError(f"rows of {self._vocabulary} and of {len(row)} logits in one file")
        self._vocabulary = len(row)
        self._write_header()
        content = self._facts[slot].tobytes() + np.ascontiguousarray(row, dtype="<f4").tobytes()
        _write(self._file, content, file_bytes(slot, self._vocabulary))

    def _free_slot(self, key: float) -> int | None:
        """Where a position with this key goes, None for nowhere."""
        if key >= self._threshold:
            return None
        if len(self._slots) < self._capacity:
            return len(self._slots)
        largest, name = -self._largest[0][0], self._largest[0][1]
        self._threshold = max(key, largest)
        if key >= largest:
            return None
        heapq.heappop(self._largest)
        return self._slots.pop(name)

    def _write_header(self) -> None:
        facts = (_MAGIC, self._vocabulary, len(self._slots), self._threshold, self._total_weight)
        header = np.array(facts, dtype=_HEADER)
        _write(self._file, header.tobytes(), 0)


@dataclass(frozen=True)
class RowChoice:
    """Which rows of one request a pass keeps.

    Attributes:
        writer: The file of the pass.
        sequence_id: The request's.
        seed: The request's, which decides with the position what is kept.
        only: By position the weight and what it stands for, where another file chose; None where weights decide.
    """

    writer: RowWriter
    sequence_id: int
    seed: int
    only: Mapping[int, tuple[float, float]] | None = None

    def draw(self, position: int) -> float | None:
        """The position's u; None where no row is kept of it whatever its weight, and none is counted."""
        if position < 0:
            return None
        if self.only is not None:
            return 0.0 if position in self.only else None
        return uniform(self.seed, position)

    def admit(self, position: int, u: float, weight: float) -> int | None:
        """The slot of a row in the file, None where it is not kept."""
        facts = (weight,) if self.only is None else self.only[position]
        return self.writer.admit(self.sequence_id, position, u, *facts)


class RowFile:
    """Reads what a `RowWriter` kept.

    Attributes:
        vocabulary: V.
        kept: The positions, by slot.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
            TableError: It is missing or is no such file.
        """
        try:
            self._file = os.open(path, os.O_RDONLY)
            header = np.frombuffer(os.pread(self._file, _HEADER.itemsize, 0), _HEADER)
        except (OSError, ValueError):
            header = np.empty(0, _HEADER)
        slots = int(header[0]["slots"]) if len(header) and header[0]["magic"] == _MAGIC else -1
        self.vocabulary = int(header[0]["vocabulary"]) if slots >= 0 else 0
        if slots < 0 or os.fstat(self._file).st_size < file_bytes(slots, self.vocabulary):
            raise TableError(
                f"{path} is truncated or holds no captured rows.", "Delete it; exact metrics then stay empty."
            )
        threshold = float(header[0]["threshold"])
        offsets = [file_bytes(slot, self.vocabulary) for slot in range(slots)]
        facts = [np.frombuffer(os.pread(self._file, _SLOT.itemsize, offset), _SLOT)[0] for offset in offsets]
        inverse = [1.0 / min(1.0, float(fact["weight"]) * threshold) for fact in facts]
        estimated = sum(float(fact["weight"]) * each for fact, each in zip(facts, inverse, strict=True))
        scale = float(header[0]["total_weight"]) / estimated if estimated else 1.0
        self.kept = []
        for slot, (fact, each) in enumerate(zip(facts, inverse, strict=True)):
            given = float(fact["stands_for"])
            stands_for = each * scale if math.isnan(given) else given
            place = int(fact["sequence_id"]), int(fact["position"]), slot
            self.kept.append(KeptRow(*place, float(fact["weight"]), stands_for))

    def row(self, slot: int) -> NDArray[np.float32]:
        """`[V]` logits."""
        offset = file_bytes(slot, self.vocabulary) + _SLOT.itemsize
        raw = os.pread(self._file, 4 * self.vocabulary, offset)
        return np.frombuffer(raw, dtype="<f4")

    def close(self) -> None:
        os.close(self._file)


def _write(file: int, content: bytes, offset: int) -> None:
    """Writes all of it; a disk that fills up takes part of a row without a word."""
    if os.pwrite(file, content, offset) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stacked(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]] | None:
    """Columns of several parts one after the other; None where there are none."""
    if not parts:
        return None
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
