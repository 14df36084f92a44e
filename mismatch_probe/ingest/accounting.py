"""What of a recorded dump cannot be log-probs or does not line up, told before any mean; nothing is repaired.

Rows go in as a reader hands them on, and findings come out (`results.finding`), worded in `report.words.ingest`. Tokens
that `loss_mask` leaves out are not looked at, but for ids and copies. Which tokens do not count is decided by the rules
of the metrics (`metrics.chunks.Unusable`), so both say the same. What is kept grows with rows, by 32 bytes each, never
with tokens, and findings do not depend on how rows were cut into chunks.

Shape legend: `R` rows of a block, `n` tokens that count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import length_reason
from mismatch_probe.ingest.blocks import Block, Ints, Tally
from mismatch_probe.ingest.chunk import Chunk
from mismatch_probe.ingest.duplicates import Duplicates
from mismatch_probe.ingest.flagged import BELOW, Positives, Values, Zeros, counts, is_placeholder
from mismatch_probe.ingest.grids import GridCount
from mismatch_probe.metrics.chunks import Side, Unusable
from mismatch_probe.metrics.constants import runs_of
from mismatch_probe.results.finding import Finding, Severity

_BLOCK = 1 << 18
_LARGEST_ID = int(np.iinfo(np.int32).max)
_SEVERITIES: tuple[Severity, ...] = ("fail", "warn", "note", "info")
CODES = (
    "mismatched-lengths",
    "ids-out-of-range",
    "equal-sides",
    "placeholder-logprobs",
    "constant-run",
    "positive-logprobs",
    "unsampled-tokens",
    "coarse-grid",
    "duplicated-sequences",
    "zeros-at-one-end",
    "masked-all",
    "empty-responses",
    "empty-prompts",
)
"""Codes of the findings; of equal severity the earlier one is the more important."""
# Share of equal tokens from which a side is hardly a record of its own, and from which it is told.
_RECOMPUTED, _MANY_EQUAL = 0.99, 0.9
_ENOUGH_TOKENS = 20
# Text of the environment: this many tokens in a row, of a mean log-prob at the trainer that sampled text does not have.
_SHORTEST_TEXT = 4
_UNLIKELY = -2.0
_FIXED_POINT = 2.0**30


class Accounting:
    """Takes in a dump row by row; bounded memory.

    Args:
        vocabulary: Ids that the model has, None where it is not known.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        self._vocabulary = vocabulary
        self._waiting: list[Chunk] = []
        self._n_waiting = 0
        self._n_rows = self._n_counted_rows = 0
        self._left_out: dict[str, tuple[Tally, Counter[str]]] = {}
        self._ids = _Ids(vocabulary)
        self._sides: dict[Side, _SideAccount] = {}
        self._both = _Both()
        self._unsampled = _Unsampled()
        self._duplicates = Duplicates()
        self._notes = {code: Tally() for code in ("masked-all", "empty-responses", "empty-prompts")}

    def update(self, chunk: Chunk) -> None:
        """Takes in rows, in the order of their files; rows that were left out for their lengths are not among them."""
        if len(chunk.rows):
            self._waiting.append(chunk)
            self._n_waiting += len(chunk.lists["response_token_ids"].values)
            if self._n_waiting >= _BLOCK:
                self._flush()

    def left_out(self, row: int, file: str, key: str, length: int, expected: int, prompt: int = 0) -> None:
        """Takes in a row that is left out, for one of its lists does not run along its response.

        Args:
            row: In its file, from 1.
            file: Name of the file.
            key: Of the list.
            length: Of the list.
            expected: Response tokens.
            prompt: Prompt tokens, 0 where they are not known.
        """
        tally, reasons = self._left_out.setdefault(key, (Tally(), Counter()))
        tally.add_row(f"{file}:{row}")
        reasons[length_reason(length, prompt, expected)] += 1
        self._n_rows += 1

    def left_out_ids(self, chunk: Chunk) -> None:
        """Takes in rows that are left out, for they have ids that cannot be any."""
        self._flush()
        self._ids.add(Block.of([chunk]))
        self._n_rows += len(chunk.rows)

    def findings(self) -> tuple[Finding, ...]:
        """What was found so far, the most important first."""
        self._flush()
        return tuple(sorted(self._found(), key=_importance))

    def _flush(self) -> None:
        if not self._waiting:
            return
        block = Block.of(self._waiting)
        self._waiting, self._n_waiting = [], 0
        self._n_rows += len(block.rows)
        self._ids.add(block)
        self._note_rows(block)
        for side in block.logprobs:
            self._sides.setdefault(side, _SideAccount())
        b, a = (block.logprobs.get(side) for side in ("rollout", "trainer"))
        why = Unusable.of(b, a, block.sequence, block.position, block.weight_version)
        sound = {side: ~(why.blamed[side] | why.constant[side]) for side in block.logprobs}
        for side, known in sound.items():
            self._sides[side].add(block, side, why, known)
        self._both.add(block, why)
        self._unsampled.add(block, why)
        self._duplicates.add(block, sound)

    def _note_rows(self, block: Block) -> None:
        lengths = block.responses.lengths
        counted = np.bincount(block.sequence, minlength=len(lengths))
        self._n_counted_rows += int(np.count_nonzero(counted))
        rows = {
            "masked-all": (lengths > 0) & (counted == 0),
            "empty-responses": lengths == 0,
            "empty-prompts": block.prompts.lengths == 0,
        }
        for code, some in rows.items():
            self._notes[code].add_rows(block, np.flatnonzero(some))

    def _found(self) -> Iterator[Finding]:
        for key, (tally, reasons) in self._left_out.items():
            told = {"key": key, **_of_rows(tally, self._n_rows)}
            yield Finding(
                code="mismatched-lengths",
                severity="warn",
                where=key,
                values={**told, "reasons": {name: float(n) for name, n in reasons.items()}},
            )
        yield from self._ids.findings(self._n_rows)
        for side, account in self._sides.items():
            yield from account.findings(side, self._n_counted_rows, self._both.gap)
        yield from self._both.findings()
        yield from self._unsampled.findings(self._n_counted_rows)
        if (copies := self._duplicates.finding()) is not None:
            yield copies
        for code, tally in self._notes.items():
            if tally.n:
                yield Finding(code=code, severity="note", values=_of_rows(tally, self._n_rows))


def _importance(found: Finding) -> tuple[int, int, float, str, str]:
    """The least is the most important; what is equally so has an order as well."""
    ranks = _SEVERITIES.index(found.severity), CODES.index(found.code)
    return *ranks, -found.number("n"), found.where, found.text("value") or found.text("end")


def _of_rows(tally: Tally, n_rows: int) -> dict[str, int | float | tuple[str, ...]]:
    return {"n": tally.n, "share": tally.n / n_rows, "places": tuple(tally.places)}


class _Ids:
    """Ids that no vocabulary has; masked tokens are read by the model as well."""

    def __init__(self, vocabulary: int | None) -> None:
        self._limit = _LARGEST_ID if vocabulary is None else min(vocabulary - 1, _LARGEST_ID)
        self._known = vocabulary
        self._tally = Tally()
        self._n_negative = 0
        self._least, self._largest = 2**63, -(2**63)

    def add(self, block: Block) -> None:
        hit: dict[int, tuple[str, int]] = {}
        for key, lists in (("prompt_token_ids", block.prompts), ("response_token_ids", block.responses)):
            values = lists.values
            if not len(values) or (values.min() >= 0 and values.max() <= self._limit):
                continue
            self._n_negative += int(np.count_nonzero(values < 0))
            index = np.flatnonzero((values < 0) | (values > self._limit))
            self._least = min(self._least, int(values[index].min()))
            self._largest = max(self._largest, int(values[index].max()))
            ends = np.cumsum(lists.lengths)
            rows = np.searchsorted(ends, index, side="right")
            places = index - (ends - lists.lengths)[rows]
            for row, first, n in zip(*np.unique(rows, return_index=True, return_counts=True), strict=True):
                place, before = hit.get(int(row), (f"{block.row_place(int(row))} {key}[{places[first]}]", 0))
                hit[int(row)] = (place, before + int(n))
        for row in sorted(hit):
            self._tally.add_row(*hit[row])

    def findings(self, n_rows: int) -> Iterator[Finding]:
        if self._tally.n:
            values = {
                "n": self._tally.n,
                "n_rows": self._tally.n_rows,
                "share_of_rows": self._tally.n_rows / n_rows,
                "n_negative": self._n_negative,
                "least": self._least,
                "largest": self._largest,
                "vocabulary": self._known,
                "places": tuple(self._tally.places),
            }
            yield Finding(code="ids-out-of-range", severity="warn", values=values)


class _SideAccount:
    """The values of one side."""

    def __init__(self) -> None:
        self._n = self._n_zeros = 0
        self._placeholders, self._constants = Values(BELOW), Values("< 0")
        self._positives, self._zeros = Positives(), Zeros()
        self._grid = GridCount()

    def add(self, block: Block, side: Side, why: Unusable, sound: NDArray[np.bool_]) -> None:
        values, recorded = block.logprobs[side], block.recorded[side]
        self._n += int(np.count_nonzero(recorded))
        blamed = why.blamed[side] & recorded
        if blamed.any():
            self._placeholders.add(block, values, np.flatnonzero(is_placeholder(values, blamed)))
        constant = why.constant[side]
        if constant.any():
            self._constants.add(block, values, np.flatnonzero(constant))
        self._positives.add(block, values)
        kept = values if sound.all() else values[sound]
        self._grid.add(kept)
        self._n_zeros += int(np.count_nonzero(kept == 0))
        other = block.recorded.get("trainer" if side == "rollout" else "rollout")
        self._zeros.add(block, values, recorded if other is None else recorded & ~other)

    def findings(self, side: Side, n_rows: int, gap: float | None) -> Iterator[Finding]:
        yield from self._placeholders.findings("placeholder-logprobs", side, self._n, n_rows, self._n_zeros)
        yield from self._constants.findings("constant-run", side, self._n, n_rows)
        yield from self._positives.findings(side, self._n, n_rows)
        yield from self._zeros.findings(side)
        if (grid := self._grid.finding(side, gap)) is not None:
            yield grid


class _Both:
    """The two sides together, over tokens that count on both."""

    def __init__(self) -> None:
        self._n = self._n_compared = self._n_equal = 0
        # In fixed point, so that the order of adding does not matter.
        self._abs_log_ratio = 0

    def add(self, block: Block, why: Unusable) -> None:
        if len(block.logprobs) < 2:
            return
        b, a = block.logprobs["rollout"], block.logprobs["trainer"]
        if (unusable := why.any).any():
            b, a = b[~unusable], a[~unusable]
        self._n += len(b)
        self._abs_log_ratio += int(np.rint(np.abs(a - b) * _FIXED_POINT).astype(np.int64).sum())
        certain = (b == 0) & (a == 0)
        self._n_compared += len(b) - int(np.count_nonzero(certain))
        self._n_equal += int(np.count_nonzero((a == b) & ~certain))

    @property
    def gap(self) -> float | None:
        """Mean |d|, nats; None where no token has both sides."""
        return self._abs_log_ratio / _FIXED_POINT / self._n if self._n else None

    def findings(self) -> Iterator[Finding]:
        share = self._n_equal / self._n_compared if self._n_compared else 0.0
        if self._n_compared >= _ENOUGH_TOKENS and share >= _MANY_EQUAL:
            values = {"n": self._n_equal, "n_compared": self._n_compared, "share": share}
            yield Finding(code="equal-sides", severity="warn" if share >= _RECOMPUTED else "note", values=values)


class _Unsampled:
    """Tokens that the mask keeps and no policy sampled."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._n = self._n_version = self._n_text = 0

    def add(self, block: Block, why: Unusable) -> None:
        self._n += len(block.sequence)
        marked, text = np.flatnonzero(why.unsampled), _text(block, why)
        self._n_version += len(marked)
        self._n_text += len(text)
        self._tally.add(block, np.union1d(marked, text))

    def findings(self, n_rows: int) -> Iterator[Finding]:
        if self._tally.n:
            told = {"n_version": self._n_version, "n_text": self._n_text}
            values = {**counts(self._tally, self._n, n_rows), **told}
            yield Finding(code="unsampled-tokens", severity="warn", values=values)


def _text(block: Block, why: Unusable) -> Ints:
    """Tokens of runs inside a response that have no log-prob at the rollout and that the trainer finds unlikely."""
    if len(block.logprobs) < 2:
        return np.empty(0, np.int64)
    missing: NDArray[np.bool_] = (why.blamed["rollout"] | why.constant["rollout"]) & block.recorded["rollout"]
    if not missing.any():
        return np.empty(0, np.int64)
    trainer, last = block.logprobs["trainer"], block.ends[1]
    follows = (np.diff(block.sequence) == 0) & (np.diff(block.position) == 1)
    found = [np.empty(0, np.int64)]
    for start, length in zip(*runs_of(missing[1:] & missing[:-1] & follows), strict=True):
        inside = block.position[start + length - 1] < last[block.sequence[start]]
        with np.errstate(invalid="ignore"):  # infinities of both signs have no mean, and are no text
            unlikely = trainer[start : start + length].mean() <= _UNLIKELY
        if length >= _SHORTEST_TEXT and inside and unlikely:
            found.append(np.arange(start, start + length))
    return np.concatenate(found)
