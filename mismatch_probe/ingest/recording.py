"""Recorded sequences as they lie on the disk, read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mismatch_probe.ingest.keys import RESPONSE
from mismatch_probe.results.dump import Recorded
from mismatch_probe.tables import table_errors

FILE = "recorded.parquet"


@dataclass(frozen=True)
class Recording:
    """Sequences that another program sampled, in the order of its files, in the generic format.

    A row has the keys that `recorded.file.keys` names, and also `prompt_id` (the dump's own, else a digest of the
    prompt's ids, so that equal prompts are one cluster of an interval), `sample_id` (running number of the sequence
    within its prompt), `file` and `row` (where it comes from). Sequence `i` of a run is row `i`.

    Attributes:
        path: The Parquet file.
        recorded: What it holds.
    """

    path: Path
    recorded: Recorded

    def __len__(self) -> int:
        return self.recorded.file.n_sequences

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows, a row group at a time.

        Raises:
            TableError: The file is missing, damaged, or has no such column.
        """
        with table_errors(self.path), pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=list(columns)).combine_chunks().to_batches()

    def masks(self) -> Iterator[NDArray[np.bool_]]:
        """Which response tokens count, by sequence."""
        for batch in self.batches(["loss_mask"]):
            yield from lists_of(batch.column(0))

    @property
    def masked(self) -> bool:
        """Whether some tokens may not count."""
        return "loss_mask" in self.recorded.file.keys

    def distinct_ids(self) -> list[int]:
        """The token ids of the responses, each once."""
        found = np.empty(0, np.int32)
        for batch in self.batches([RESPONSE]):
            found = np.union1d(found, batch.column(0).flatten().to_numpy())
        return [int(one) for one in found]


def lists_of(column: pa.ListArray) -> list[NDArray[Any]]:
    """The lists of a column as arrays that share their memory."""
    values, offsets = column.flatten().to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise((offsets - offsets[0]).tolist())]
