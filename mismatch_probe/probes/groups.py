"""By what the sequences and tokens of a dump can be sorted: step, replica, tag, turn, age of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.keys import KEYS
from mismatch_probe.ingest.recording import FILE, Recording, lists_of
from mismatch_probe.metrics.chunks import UNSAMPLED, WEIGHT_VERSION, Ints
from mismatch_probe.metrics.frame import Rows
from mismatch_probe.metrics.groups import STEP, Grouping
from mismatch_probe.runs.comparison import RunDirectory

LAG = "lag"
_OF_SEQUENCES = (STEP, "replica", "tags", "finish_reason", "pack_index")
_OF_TOKENS = ("turn", WEIGHT_VERSION)
NONE = -1
"""Stands for what a row does not say, in a column of integers."""


def coded(key: str, values: Sequence[Any]) -> tuple[Ints, tuple[str, ...] | None]:
    """Values `[S]` of a key of rows: integers as they are, labels as codes from 0 with their names; `NONE` for none."""
    if KEYS[key].kind == "integer":
        return np.array([NONE if value is None else value for value in values], np.int64), None
    labels = sorted({value for value in values if value})
    code = {label: index for index, label in enumerate(labels)}
    return np.array([code.get(value, NONE) for value in values], np.int64), tuple(labels)


class RecordedGroups:
    """What the rows of a dump say of their sequences and tokens beside log-probs.

    Args:
        recording: The rows.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._keys = frozenset(recording.recorded.file.keys)

    @cached_property
    def groupings(self) -> list[Grouping]:
        """What the metrics are computed by."""
        found = [self._of_sequences(key) for key in _OF_SEQUENCES if key in self._keys]
        found += [Grouping("turn")] if "turn" in self._keys else []
        return found + ([Grouping(LAG)] if WEIGHT_VERSION in self._keys else [])

    def _of_sequences(self, key: str) -> Grouping:
        return Grouping(
            key,
            *coded(key, [value for batch in self._recording.batches([key]) for value in batch.column(0).to_pylist()]),
        )

    def columns(self) -> Iterator[Rows] | None:
        """What the tokens that count have, in the order of the run's tables; None where they have nothing.

        `weight_version` is that of the weights that sampled a token. `lag` is how many versions older these are than
        those of the trainer, or, where the dump does not name these, than the newest of the same step.
        """
        return self._columns() if self._keys & {*_OF_TOKENS} else None

    def _columns(self) -> Iterator[Rows]:
        keys = [key for key in _OF_TOKENS if key in self._keys]
        newest = self._newest if WEIGHT_VERSION in keys else np.empty(0, np.int64)
        first = 0
        for batch in self._recording.batches([*keys, *(["loss_mask"] if self._recording.masked else [])]):
            lists = {key: lists_of(batch.column(key)) for key in batch.schema.names}
            rows = {key: np.concatenate(lists[key]) for key in keys}
            if WEIGHT_VERSION in rows:
                versions = rows[WEIGHT_VERSION]
                lengths = [len(one) for one in lists[WEIGHT_VERSION]]
                of_token = np.repeat(newest[first : first + batch.num_rows], lengths)
                rows[LAG] = np.where(versions == UNSAMPLED, NONE, of_token - versions)
            if self._recording.masked:
                counts = np.concatenate(lists["loss_mask"])
                rows = {key: values[counts] for key, values in rows.items()}
            first += batch.num_rows
            yield rows

    @cached_property
    def _newest(self) -> NDArray[np.int64]:
        """`[S]` the version that the age of a sequence's weights is counted from."""
        if "trainer_version" in self._keys:
            return np.concatenate(
                [batch.column(0).to_numpy() for batch in self._recording.batches(["trainer_version"])]
            )
        has_step = STEP in self._keys
        steps: list[int] = []
        versions: list[int] = []
        for batch in self._recording.batches([WEIGHT_VERSION, *([STEP] if has_step else [])]):
            versions += [int(one.max(initial=UNSAMPLED)) for one in lists_of(batch.column(WEIGHT_VERSION))]
            steps += batch.column(STEP).to_pylist() if has_step else [0] * batch.num_rows
        newest: dict[int, int] = {}
        for step, version in zip(steps, versions, strict=True):
            newest[step] = max(newest.get(step, UNSAMPLED), version)
        return np.array([newest[step] for step in steps], np.int64)


def recorded_groups(run: RunDirectory) -> RecordedGroups | None:
    """Of a run `--from` a dump; None for another, and for one of an earlier release that did not keep its rows."""
    recorded, file = run.manifest.recorded, run.path / FILE
    return None if recorded is None or not file.exists() else RecordedGroups(Recording(file, recorded))
