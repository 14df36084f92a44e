"""Where metrics meet the tables: two passes of a run directory become chunks of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mismatch_probe.errors import TableError
from mismatch_probe.metrics.nulls import NullStat, null_stat
from mismatch_probe.tables import RunDirectory
from mismatch_probe.types import PairArrays

CHUNK_TOKENS = 1 << 19

_KEYS = ("sequence_id", "position", "token_id")
Rows = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PassSequences:
    """The sequences that a rollout pass sampled, in the order that a pair counts them in.

    Attributes:
        ids: `[S]` sequence ids, increasing.
        prompt: `[S]` index of each one's prompt.
        prompt_ids: `[P]` names of the prompts, sorted.
    """

    ids: NDArray[np.int64]
    prompt: NDArray[np.int64]
    prompt_ids: tuple[str, ...]

    def index_of(self, sequence_id: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[N]` index of the sequence of each row, −1 for another pass's. Rows of a sequence lie next to each other."""
        starts = (
            np.flatnonzero(np.diff(sequence_id, prepend=sequence_id[0] - 1))
            if len(sequence_id)
            else np.empty(0, np.int64)
        )
        heads = sequence_id[starts]
        index = np.searchsorted(self.ids, heads)
        known = index < len(self.ids)
        known[known] = self.ids[index[known]] == heads[known]
        return np.repeat(np.where(known, index, -1), np.diff(starts, append=len(sequence_id)))


def pass_sequences(run: RunDirectory, rollout_pass: str) -> PassSequences:
    """The sequences of a rollout pass.

    Raises:
        TableError: Their table is missing, corrupt, or has another number of rows than the manifest says.
    """
    table = run.sequence_names(rollout_pass)
    ids: NDArray[np.int64] = table["sequence_id"].to_numpy()
    order = np.argsort(ids)
    names = np.array(table["prompt_id"].to_pylist(), dtype=object)[order]
    prompt_ids, prompt = np.unique(names.astype(str), return_inverse=True)
    return PassSequences(ids[order], prompt.astype(np.int64), tuple(str(name) for name in prompt_ids))


def pair_chunks(
    run: RunDirectory,
    rollout_pass: str,
    trainer_pass: str,
    *,
    columns: Sequence[str] = (),
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[PairArrays]:
    """The tokens that one pass sampled, with the log-probs of both sides, in chunks of whole sequences.

    Args:
        run: Whose tables.
        rollout_pass: The pass that sampled.
        trainer_pass: The pass that scored them, perhaps among sequences of other passes.
        columns: Further columns of the rollout pass's tokens that the chunks are to carry.
        chunk_tokens: A chunk ends with the first sequence that brings it to this many tokens.

    Yields:
        At least one chunk, which is empty when there are no tokens.

    Raises:
        TableError: The passes do not hold the same tokens.
    """
    sequences = pass_sequences(run, rollout_pass)
    kept: list[Rows] = []
    size = 0
    for rows in _paired_rows(run, rollout_pass, trainer_pass, sequences, columns):
        kept.append(rows)
        size += len(rows["sequence"])
        if size < chunk_tokens:
            continue
        joined = _concatenate(kept)
        # The last sequence may go on in the next batch.
        cut = int(np.searchsorted(joined["sequence"], joined["sequence"][-1]))
        if cut:
            yield _pair(sequences, {name: values[:cut] for name, values in joined.items()}, columns)
        # Copied, so that what was yielded can be freed.
        kept, size = [{name: values[cut:].copy() for name, values in joined.items()}], size - cut
    yield _pair(sequences, _concatenate(kept), columns)


def pair_arrays(run: RunDirectory, rollout_pass: str, trainer_pass: str) -> PairArrays:
    """A whole pair in memory: its chunks, as one.

    Raises:
        TableError: The passes do not hold the same tokens.
    """
    (pair,) = pair_chunks(run, rollout_pass, trainer_pass, chunk_tokens=1 << 62)
    return pair


def _paired_rows(
    run: RunDirectory, rollout_pass: str, trainer_pass: str, sequences: PassSequences, columns: Sequence[str]
) -> Iterator[Rows]:
    """Rows of both passes side by side, as they come."""
    bounds = _bounds(sequences.ids)
    wanted = dict.fromkeys((*_KEYS, "logprob", *columns))
    rollout = _Feed(run.iter_tokens(rollout_pass, list(wanted)), sequences)
    trainer = _Feed(run.iter_tokens(trainer_pass, [*_KEYS, "logprob"], ids=bounds), sequences, skip_others=True)
    last = -1
    while (n := min(rollout.fill(), trainer.fill())) > 0:
        here, there = rollout.take(n), trainer.take(n)
        differing = [name for name in _KEYS if not np.array_equal(here[name], there[name])]
        if differing:
            raise _differ(rollout_pass, trainer_pass, differing[0])
        if here["sequence"][0] < last or (np.diff(here["sequence"]) < 0).any() or here["sequence"].min() < 0:
            raise _differ(rollout_pass, trainer_pass, "sequence_id")
        last = int(here["sequence"][-1])
        yield here | {"trainer_logprob": there["logprob"]}
    if rollout.fill() or trainer.fill():
        raise _differ(rollout_pass, trainer_pass, "sequence_id")


def _bounds(ids: NDArray[np.int64]) -> tuple[int, int]:
    return (int(ids[0]), int(ids[-1])) if len(ids) else (0, -1)


def _differ(rollout_pass: str, trainer_pass: str, column: str) -> TableError:
    return TableError(
        f"Passes {rollout_pass} and {trainer_pass} differ in their {column} column, so they cannot be paired.",
        "Run the comparison again.",
    )


class _Feed:
    """Rows of a pass as arrays, taken in whatever numbers the other pass has at hand."""

    def __init__(self, batches: Iterator[pa.Table], sequences: PassSequences, *, skip_others: bool = False) -> None:
        self._batches, self._sequences, self._skip_others = batches, sequences, skip_others
        self._rows: Rows = {}
        self._next = 0

    def fill(self) -> int:
        """Rows at hand, after another batch was read where there were none; 0 at the end."""
        while self._left() == 0:
            batch = next(self._batches, None)
            if batch is None:
                return 0
            rows = {name: batch[name].to_numpy() for name in batch.column_names}
            rows["sequence"] = self._sequences.index_of(rows["sequence_id"])
            if self._skip_others and (other := rows["sequence"] < 0).any():
                rows = {name: values[~other] for name, values in rows.items()}
            self._rows, self._next = rows, 0
        return self._left()

    def take(self, n: int) -> Rows:
        """The next `n` of them."""
        start, self._next = self._next, self._next + n
        return {name: values[start : self._next] for name, values in self._rows.items()}

    def _left(self) -> int:
        return len(self._rows["sequence"]) - self._next if self._rows else 0


def _concatenate(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _pair(sequences: PassSequences, rows: Rows, columns: Sequence[str]) -> PairArrays:
    nothing = np.empty(0)
    return PairArrays(
        rollout_logprob=rows.get("logprob", nothing).astype(np.float64),
        trainer_logprob=rows.get("trainer_logprob", nothing).astype(np.float64),
        sequence=rows.get("sequence", nothing).astype(np.int64, copy=False),
        position=rows.get("position", nothing).astype(np.int64),
        prompt=sequences.prompt,
        prompt_ids=sequences.prompt_ids,
        columns={name: rows.get(name, nothing) for name in columns},
    )


def null_of(run: RunDirectory, pass_id: str, null_pass: str) -> NullStat:
    """How far a pass is from itself: the tokens that both runs of it produced, compared where their ids agree."""
    columns = [*_KEYS, "logprob"]
    again = _concatenate([_arrays(batch) for batch in run.iter_tokens(null_pass, columns)] or [_no_rows(columns)])
    ids = np.unique(again["sequence_id"])
    # The null repeats a few sequences; only those of the pass are kept.
    repeated = pa.array(ids)
    batches = run.iter_tokens(pass_id, columns, ids=_bounds(ids))
    kept = [_arrays(batch.filter(pc.is_in(batch["sequence_id"], value_set=repeated))) for batch in batches]
    first = _concatenate(kept or [_no_rows(columns)])
    key, wanted = (rows["sequence_id"] * (1 << 32) + rows["position"] for rows in (first, again))
    # A repeat that went another way can be longer than the first run; only positions that both have can be compared.
    shared = np.isin(wanted, key)
    rows = np.searchsorted(key, wanted[shared])
    return null_stat(
        first["token_id"][rows],
        first["logprob"][rows].astype(np.float64),
        again["token_id"][shared],
        again["logprob"][shared].astype(np.float64),
        again["sequence_id"][shared],
    )


def _arrays(batch: pa.Table) -> Rows:
    return {name: batch[name].to_numpy() for name in batch.column_names}


def _no_rows(columns: Sequence[str]) -> Rows:
    return dict.fromkeys(columns, np.empty(0, dtype=np.int64))
