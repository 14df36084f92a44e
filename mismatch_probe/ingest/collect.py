"""Chunks of rows, put together into a `RecordedRun`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mismatch_probe.ingest.base import Ragged, RecordedRun
from mismatch_probe.ingest.chunks import (
    IDS,
    LOGPROBS,
    PER_TOKEN,
    SCALARS,
    UNIFORM,
    Chunk,
    check_label,
    check_step,
    check_values,
)
from mismatch_probe.ingest.refusal import Place, quoted, quoted_list
from mismatch_probe.metrics.accounting import LARGEST
from mismatch_probe.results.manifest import Source

_DIGEST_LENGTH = 16
_MOST_IGNORED = 100
_GROWTH = 1.25


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
            file_format: `"jsonl"` or `"parquet"`.
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
