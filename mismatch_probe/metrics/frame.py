"""Where metrics meet the tables: two passes of a run directory become one `PairArrays`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mismatch_probe.errors import TableError
from mismatch_probe.metrics.nulls import NullStat, null_stat
from mismatch_probe.tables import RunDirectory
from mismatch_probe.types import PairArrays


def pair_arrays(run: RunDirectory, rollout_pass: str, trainer_pass: str) -> PairArrays:
    """The tokens that one pass sampled, with the log-probs of both sides.

    Raises:
        TableError: The passes do not hold the same tokens.
    """
    sequences = run.sequences(rollout_pass)
    rollout = run.tokens(rollout_pass)
    trainer = _rows_of(run.tokens(trainer_pass), sequences)
    for column in ("sequence_id", "position", "token_id"):
        if not np.array_equal(_array(rollout, column), _array(trainer, column)):
            raise TableError(
                f"Passes {rollout_pass} and {trainer_pass} differ in their {column} column, so they cannot be paired.",
                "Run the comparison again.",
            )
    order = np.argsort(_array(sequences, "sequence_id"))
    ids = _array(sequences, "sequence_id")[order]
    names = np.array(sequences["prompt_id"].to_pylist(), dtype=object)[order]
    prompt_ids, prompt = np.unique(names.astype(str), return_inverse=True)
    return PairArrays(
        rollout_logprob=_array(rollout, "logprob").astype(np.float64),
        trainer_logprob=_array(trainer, "logprob").astype(np.float64),
        sequence=np.searchsorted(ids, _array(rollout, "sequence_id")),
        position=_array(rollout, "position").astype(np.int64),
        prompt=prompt.astype(np.int64),
        prompt_ids=tuple(str(name) for name in prompt_ids),
    )


def null_of(run: RunDirectory, pass_id: str, null_pass: str) -> NullStat:
    """How far a pass is from itself: the tokens that both runs of it produced, compared where their ids agree."""
    again = run.tokens(null_pass)
    first = run.tokens(pass_id)
    key = _array(first, "sequence_id") * (1 << 32) + _array(first, "position")
    wanted = _array(again, "sequence_id") * (1 << 32) + _array(again, "position")
    # A repeat that went another way can be longer than the first run; only positions that both have can be compared.
    shared = np.isin(wanted, key)
    rows = np.searchsorted(key, wanted[shared])
    return null_stat(
        _array(first, "token_id")[rows],
        _array(first, "logprob")[rows].astype(np.float64),
        _array(again, "token_id")[shared],
        _array(again, "logprob")[shared].astype(np.float64),
        _array(again, "sequence_id")[shared],
    )


def _rows_of(tokens: pa.Table, sequences: pa.Table) -> pa.Table:
    return tokens.filter(pc.is_in(tokens["sequence_id"], value_set=sequences["sequence_id"].combine_chunks()))


def _array(table: pa.Table, column: str) -> NDArray[Any]:
    array: NDArray[Any] = table[column].to_numpy()
    return array
