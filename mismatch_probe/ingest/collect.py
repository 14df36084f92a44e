"""Rows on their way from a reader into a `RecordedRun`, and the rules that every row obeys, whatever its format.

Readers check what only they can know (syntax, the types of values); lengths, ranges and presence are checked here, on
whole arrays. Shape legend: `R` rows of a chunk.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mismatch_probe.ingest.base import Place, Ragged, RecordedRun, Side, kind, quoted, quoted_list, wrong_length
from mismatch_probe.metrics.chunks import LARGEST
from mismatch_probe.results.manifest import Source

IDS = ("prompt_token_ids", "response_token_ids")
LOGPROBS: dict[str, Side] = {"rollout_logprobs": "rollout", "trainer_logprobs": "trainer"}
PER_TOKEN = (*LOGPROBS, "loss_mask")
LISTS = (*IDS, *PER_TOKEN)
SCALARS = ("step", "prompt_id", "finish_reason")
KEYS = frozenset({*LISTS, *SCALARS})
# In every row or in none; a finish reason may be missing anywhere, for nothing is computed from it.
UNIFORM = (*PER_TOKEN, "step", "prompt_id")
LARGEST_ID = int(np.iinfo(np.int32).max)
_DIGEST_LENGTH = 16
_MOST_IGNORED = 100
_GROWTH = 1.25


@dataclass(frozen=True)
class Lists:
    """A list column: all its values in a row, and `[R]` int64 lengths, −1 where a row has no list."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    def locate(self, index: int) -> tuple[int, int]:
        """The row in which `values[index]` lies, and its place in that row's list."""
        ends = np.cumsum(np.maximum(self.lengths, 0))
        row = int(np.searchsorted(ends, index, side="right"))
        return row, index - int(ends[row - 1] if row else 0)

    def keep(self, rows: NDArray[np.bool_]) -> Lists:
        return Lists(self.values[np.repeat(rows, np.maximum(self.lengths, 0))], self.lengths[rows])


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file.

    Attributes:
        rows: `[R]` int64, where they stand in the file, from 1.
        lists: By key of `LISTS`; the two of `IDS` are always there and have a list in every row.
        scalars: By key of `SCALARS`, `R` values each, None where a row has none.
        names: All keys or columns that were found there, for messages.
    """

    rows: NDArray[np.int64]
    lists: dict[str, Lists]
    scalars: dict[str, list[Any]]
    names: Collection[str]

    def keep(self, rows: NDArray[np.bool_]) -> Chunk:
        """The rows where the `[R]` mask is True."""
        if rows.all():
            return self
        return Chunk(
            self.rows[rows],
            {key: column.keep(rows) for key, column in self.lists.items()},
            {key: [v for v, kept in zip(column, rows, strict=True) if kept] for key, column in self.scalars.items()},
            self.names,
        )

    def present(self, key: str) -> NDArray[np.bool_]:
        """`[R]` bool, whether a row has a value of a key."""
        if key in self.lists:
            return self.lists[key].lengths >= 0
        return np.array([value is not None for value in self.scalars.get(key, [None] * len(self.rows))], bool)


def check_values(place: Place, chunk: Chunk) -> None:
    """Token ids lie in 0 … 2³¹−1, masks hold 0 and 1 only, and what is per token is as long as the response.

    Raises:
        IngestError: One does not; its row is named.
    """
    for key in IDS:
        values = chunk.lists[key].values
        fix = "Write the ids that the model saw, without padding."
        _refuse_first(place, chunk, key, (values < 0) | (values > LARGEST_ID), f"is outside 0 to {LARGEST_ID}", fix)
    prompts, responses = (chunk.lists[key].lengths for key in IDS)
    for key in PER_TOKEN:
        if key not in chunk.lists:
            continue
        lengths = chunk.lists[key].lengths
        wrong = np.flatnonzero((lengths >= 0) & (lengths != responses))
        if len(wrong):
            row = int(wrong[0])
            length, prompt, response = (int(each[row]) for each in (lengths, prompts, responses))
            place.refuse(int(chunk.rows[row]), *wrong_length(key, length, prompt, response))
    if "loss_mask" in chunk.lists:
        values = chunk.lists["loss_mask"].values
        fix = "Write one 0 or 1 per response token."
        _refuse_first(place, chunk, "loss_mask", (values != 0) & (values != 1), "is neither 0 nor 1", fix)


def _refuse_first(place: Place, chunk: Chunk, key: str, bad: NDArray[np.bool_], what: str, fix: str) -> None:
    if not bad.any():
        return
    index = int(np.argmax(bad))
    row, position = chunk.lists[key].locate(index)
    value = chunk.lists[key].values[index]
    place.refuse(int(chunk.rows[row]), f"has {value} as {key}[{position}], which {what}", fix)


def check_step(place: Place, row: int, value: Any) -> int | None:
    """A training step: an integer of 64 bits.

    Raises:
        IngestError: It is something else.
    """
    if value is not None and (type(value) is not int or not -(2**63) <= value < 2**63):
        place.refuse(row, f"has a step that is {kind(value)}, not a 64-bit integer", "Write the step as an integer.")
    return value


def check_label(place: Place, row: int, key: str, value: Any) -> str | None:
    """A name: text, or an integer, which is written out.

    Raises:
        IngestError: It is something else, or text that cannot be encoded.
    """
    if value is None:
        return None
    if type(value) not in (str, int):
        place.refuse(row, f"has a {key} that is {kind(value)}", f"Write {key} as text.")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        # JSON can spell half of a surrogate pair, which no table takes.
        place.refuse(row, f"has a {key} with an unpaired surrogate escape", "Write the character or both surrogates.")
    return text


class _Growing:
    """A flat array that is appended to in place: joining pieces at the end would hold a large file twice."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._array: NDArray[Any] = np.empty(0, dtype)
        self._length = 0

    def extend(self, values: NDArray[Any]) -> None:
        end = self._length + len(values)
        if end > len(self._array):
            # No view of the array exists yet, so that it may move.
            self._array.resize(max(end, int(_GROWTH * len(self._array))), refcheck=False)
        self._array[self._length : end] = values
        self._length = end

    def done(self) -> NDArray[Any]:
        self._array.resize(self._length, refcheck=False)
        return self._array


class Collector:
    """Takes chunk after chunk and keeps columns only.

    Args:
        place: The file, for refusals.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._n_rows = 0
        self._present: dict[str, bool] = {}
        self._first_row = 0
        self._rows: list[NDArray[np.int64]] = []
        self._values: dict[str, _Growing] = {}
        self._lengths: dict[str, list[NDArray[np.int64]]] = {key: [] for key in IDS}
        self._scalars: dict[str, list[Any]] = {key: [] for key in SCALARS}
        self._labels: dict[str, str] = {}

    def add(self, chunk: Chunk) -> None:
        """Checks a chunk and keeps those of its rows that have a response.

        Raises:
            IngestError: A row breaks a rule of the format.
        """
        self._n_rows += len(chunk.rows)
        check_values(self._place, chunk)
        chunk = chunk.keep(chunk.lists["response_token_ids"].lengths > 0)
        if len(chunk.rows):
            self._check_presence(chunk)
            self._keep(chunk)

    def _check_presence(self, chunk: Chunk) -> None:
        """With holes in a column, two metrics of one file would be about different tokens."""
        present = {key: chunk.present(key) for key in UNIFORM}
        if not self._present:
            self._first_row = int(chunk.rows[0])
            self._present = {key: bool(there[0]) for key, there in present.items()}
        first = f"{self._place.row_word.lower()} {self._first_row}"
        for key, there in present.items():
            odd = np.flatnonzero(there != self._present[key])
            if len(odd):
                no, yes = f"has no {key}, which {first} has", f"has {key}, which {first} does not have"
                what = no if self._present[key] else yes
                self._place.refuse(int(chunk.rows[odd[0]]), what, f"Write {key} in every row or in none.")
        if not any(self._present[key] for key in LOGPROBS):
            self._place.refuse(
                self._first_row,
                f"has neither {' nor '.join(LOGPROBS)}; its keys are {quoted_list(chunk.names)}",
                "Record the log-probs of at least one side, one per response token.",
            )

    def _keep(self, chunk: Chunk) -> None:
        self._rows.append(chunk.rows)
        for key in IDS:
            self._lengths[key].append(chunk.lists[key].lengths)
            self._extend(key, chunk.lists[key].values, np.int32)
        for key in PER_TOKEN:
            if self._present[key]:
                values = chunk.lists[key].values
                self._extend(key, values, bool if key == "loss_mask" else values.dtype)
        for key in SCALARS:
            for row, value in zip(chunk.rows, chunk.scalars.get(key, [None] * len(chunk.rows)), strict=True):
                if key == "step":
                    self._scalars[key].append(check_step(self._place, int(row), value))
                else:  # one object per distinct label: a column of them is mostly repeats
                    label = check_label(self._place, int(row), key, value) or ""
                    self._scalars[key].append(self._labels.setdefault(label, label))

    def _extend(self, key: str, values: NDArray[Any], dtype: DTypeLike) -> None:
        if key not in self._values:
            self._values[key] = _Growing(dtype)
        self._values[key].extend(values)

    def finish(self, file_format: str, sha256: str, ignored: Iterable[str]) -> RecordedRun:
        """Puts the run together; call it once.

        Args:
            file_format: Name of the format, e.g. `"jsonl"`.
            sha256: Digest of the file.
            ignored: Names of the columns that were not read.

        Raises:
            IngestError: There is no row, no response token, or none that counts.
        """
        if not self._n_rows:
            self._place.refuse_file("has no rows", "Write one row per sequence.")
        if not self._rows:
            self._place.refuse_file("has no response tokens", "Record response_token_ids as sampled.")
        prompts, responses = (Ragged(self._values[key].done(), self._offsets(key)) for key in IDS)
        columns = {key: Ragged(self._values[key].done(), responses.offsets) for key in PER_TOKEN if self._present[key]}
        mask = columns.get("loss_mask")
        if mask is not None and not mask.values.any():
            self._place.refuse_file("has a loss_mask of only zeros", "Set it to 1 for the tokens to compare.")
        names = self._scalars["prompt_id"] if self._present["prompt_id"] else [_digest(prompt) for prompt in prompts]
        return RecordedRun(
            prompt_token_ids=prompts,
            response_token_ids=responses,
            rollout_logprobs=columns.get("rollout_logprobs"),
            trainer_logprobs=columns.get("trainer_logprobs"),
            loss_mask=mask,
            step=np.array(self._scalars["step"], np.int64) if self._present["step"] else None,
            prompt_ids=tuple(names),
            sample_ids=_running_numbers(names),
            finish_reasons=tuple(self._scalars["finish_reason"]),
            rows=np.concatenate(self._rows),
            source=Source(
                path=self._place.name,
                format=file_format,
                sha256=sha256,
                n_rows=self._n_rows,
                n_empty_responses=self._n_rows - len(responses),
                n_sequences=len(responses),
                n_tokens=len(responses.values),
                n_masked_tokens=0 if mask is None else int(np.sum(~mask.values)),
                n_masked_sequences=0 if mask is None else len(mask) - _true_lists(mask),
                n_empty_prompts=int(np.sum(prompts.lengths == 0)),
                n_positive={side: _n_positive(columns[key], mask) for key, side in LOGPROBS.items() if key in columns},
                ignored_columns=_listed(ignored),
            ),
        )

    def _offsets(self, key: str) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(self._lengths[key]), dtype=np.int64)])


def _digest(token_ids: NDArray[np.int32]) -> str:
    """A name for a prompt that depends on its ids alone, not on the file nor the machine."""
    return hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest()[:_DIGEST_LENGTH]


def _running_numbers(names: Sequence[str]) -> NDArray[np.int32]:
    seen: Counter[str] = Counter()
    numbers = np.empty(len(names), np.int32)
    for index, name in enumerate(names):
        numbers[index] = seen[name]
        seen[name] += 1
    return numbers


def _true_lists(mask: Ragged[np.bool_]) -> int:
    """How many lists, none of them empty, hold a True."""
    return int(np.sum(np.logical_or.reduceat(mask.values, mask.offsets[:-1])))


def _n_positive(logprobs: Ragged[Any], mask: Ragged[np.bool_] | None) -> int:
    positive = (logprobs.values > LARGEST) & np.isfinite(logprobs.values)
    return int(np.sum(positive if mask is None else positive & mask.values))


def _listed(names: Iterable[str]) -> tuple[str, ...]:
    ordered = sorted(names)
    more = len(ordered) - _MOST_IGNORED
    return (*(quoted(name)[1:-1] for name in ordered[:_MOST_IGNORED]), *([f"and {more} more"] if more > 0 else []))
