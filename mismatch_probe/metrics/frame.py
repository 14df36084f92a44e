"""Where metrics meet the tables: two passes of a run directory become chunks of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mismatch_probe.errors import TableError
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.chunks import WEIGHT_VERSION, group_sums, usable
from mismatch_probe.metrics.curves import KINDS, kind_of
from mismatch_probe.metrics.exact import ExactRows
from mismatch_probe.metrics.self_noise import SelfNoise, self_noise
from mismatch_probe.tables import PassTables
from mismatch_probe.types import DIVERGENCES, DRIFT_BUCKETS, PairArrays

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
        step: `[S]` training step of each, None where they have none.
    """

    ids: NDArray[np.int64]
    prompt: NDArray[np.int64]
    prompt_ids: tuple[str, ...]
    step: NDArray[np.int64] | None

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


def pass_sequences(run: PassTables, rollout_pass: str) -> PassSequences:
    """The sequences of a rollout pass.

    Raises:
        TableError: Their table is missing, corrupt, or has another number of rows than the manifest says.
    """
    table = run.sequence_names(rollout_pass)
    ids: NDArray[np.int64] = table["sequence_id"].to_numpy()
    order = np.argsort(ids)
    names = np.array(table["prompt_id"].to_pylist(), dtype=object)[order]
    prompt_ids, prompt = np.unique(names.astype(str), return_inverse=True)
    steps = table["step"]
    step = None if len(steps) == 0 or steps.null_count else steps.to_numpy()[order]
    return PassSequences(ids[order], prompt.astype(np.int64), tuple(str(name) for name in prompt_ids), step)


def pair_chunks(
    run: PassTables,
    rollout_pass: str,
    trainer_pass: str,
    *,
    trainer_columns: Sequence[str] = (),
    reference_pass: str | None = None,
    special_ids: Sequence[int] | None = None,
    rollout_entropy: bool = False,
    beside: Iterator[Rows] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[PairArrays]:
    """The tokens that one pass sampled, with the log-probs of both sides, in chunks of whole sequences.

    Args:
        run: Whose tables.
        rollout_pass: The pass that sampled, or that decoded the sequences of another pass again.
        trainer_pass: The pass that scored them, perhaps among sequences of other passes.
        trainer_columns: Further columns of the trainer pass's tokens that the chunks are to carry.
        reference_pass: A third pass that scored them; chunks carry its log-probs as `reference_logprob`.
        special_ids: Where given, chunks carry what each token is made of as `token_kind`, see `metrics.curves`.
        rollout_entropy: Whether chunks carry `rollout_entropy`, nats, NaN but at the positions at which the trainer
            pass compared rows of logits; without such positions they do not.
        beside: Further columns of the tokens, in their order and in parts of any length, that the chunks are to carry.
        chunk_tokens: A chunk ends with the first sequence that brings it to this many tokens.

    Yields:
        At least one chunk, which is empty when there are no tokens.

    Raises:
        TableError: The passes do not hold the same tokens.
    """
    sequences = pass_sequences(run, rollout_pass)
    texts = [] if special_ids is None else ["token_text"]
    feeds = [
        _Feed(run, rollout_pass, sequences, texts, special_ids or (), skip_others=False),
        _Feed(run, trainer_pass, sequences, trainer_columns),
    ]
    if reference_pass is not None:
        feeds.append(_Feed(run, reference_pass, sequences))
    source = run.source_of(rollout_pass)
    why = "" if source == rollout_pass else f"these tokens were sampled by {source}"
    chunks = _pairs(sequences, feeds, None if beside is None else _Beside(beside), why, chunk_tokens)
    compared = _compared(run, rollout_pass, trainer_pass) if rollout_entropy else None
    if compared is not None:
        chunks = _with_entropies(chunks, sequences, compared)
    yield from _ahead(chunks)


def _pairs(
    sequences: PassSequences, feeds: Sequence[_Feed], beside: _Beside | None, why: str, chunk_tokens: int
) -> Iterator[PairArrays]:
    kept: list[Rows] = []
    size = 0
    for rows in _paired_rows(feeds):
        kept.append(rows if beside is None else rows | beside.take(len(rows["sequence"])))
        size += len(rows["sequence"])
        if size < chunk_tokens:
            continue
        joined = _concatenate(kept)
        # The last sequence may go on in the next batch.
        cut = int(np.searchsorted(joined["sequence"], joined["sequence"][-1]))
        if cut:
            yield _pair(sequences, {name: values[:cut] for name, values in joined.items()}, why)
        # Copied, so that what was yielded can be freed.
        kept, size = [{name: values[cut:].copy() for name, values in joined.items()}], size - cut
    yield _pair(sequences, _concatenate(kept), why)


def _ahead(chunks: Iterator[PairArrays]) -> Iterator[PairArrays]:
    """The same chunks; the next one is read in a thread while the present one is computed with."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = reader.submit(next, chunks, None)
            yield chunk


def pair_arrays(run: PassTables, rollout_pass: str, trainer_pass: str) -> PairArrays:
    """A whole pair in memory: its chunks, as one.

    Raises:
        TableError: The passes do not hold the same tokens.
    """
    (pair,) = pair_chunks(run, rollout_pass, trainer_pass, chunk_tokens=1 << 62)
    return pair


def _paired_rows(feeds: Sequence[_Feed]) -> Iterator[Rows]:
    """Rows of the rollout, the trainer, and perhaps a reference, side by side, as they come."""
    first, *others = feeds
    last = -1
    while (n := min(feed.fill() for feed in feeds)) > 0:
        here, *there = [feed.take(n) for feed in feeds]
        for feed, rows in zip(others, there, strict=True):
            differing = [name for name in _KEYS if not np.array_equal(here[name], rows[name])]
            if differing:
                raise _differ(first, feed, differing[0])
        if here["sequence"][0] < last or (np.diff(here["sequence"]) < 0).any() or here["sequence"].min() < 0:
            raise _differ(first, others[0], "sequence_id")
        last = int(here["sequence"][-1])
        named = zip(("trainer_logprob", "reference_logprob"), there, strict=False)
        yield there[0] | here | {name: rows["logprob"] for name, rows in named}
    behind = [feed for feed in others if bool(feed.fill()) != bool(first.fill())]
    if behind or first.fill():
        raise _differ(first, (behind or others)[0], "sequence_id")


def _bounds(ids: NDArray[np.int64]) -> tuple[int, int]:
    return (int(ids[0]), int(ids[-1])) if len(ids) else (0, -1)


def _differ(first: _Feed, other: _Feed, column: str) -> TableError:
    return TableError(
        f"Passes {first.pass_id} and {other.pass_id} differ in their {column} column, so they cannot be paired.",
        "Run the comparison again.",
    )


class _Feed:
    """Rows of a pass as arrays, taken in whatever numbers the other pass has at hand."""

    def __init__(
        self,
        run: PassTables,
        pass_id: str,
        sequences: PassSequences,
        columns: Sequence[str] = (),
        special_ids: Sequence[int] = (),
        *,
        skip_others: bool = True,
    ) -> None:
        self.pass_id = pass_id
        bounds = _bounds(sequences.ids) if skip_others else None
        self._batches = run.iter_tokens(pass_id, [*_KEYS, "logprob", *columns], ids=bounds)
        self._sequences, self._special, self._skip_others = sequences, special_ids, skip_others
        self._rows: Rows = {}
        self._next = 0

    def fill(self) -> int:
        """Rows at hand, after another batch was read where there were none; 0 at the end."""
        while self._left() == 0:
            batch = next(self._batches, None)
            if batch is None:
                return 0
            rows = _arrays(batch, self._special)
            rows["sequence"] = self._sequences.index_of(rows["sequence_id"])
            # A trainer pass also holds the sequences of other rollouts.
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


class _Beside:
    """Columns of the same tokens that come in parts of their own."""

    def __init__(self, parts: Iterator[Rows]) -> None:
        self._parts = parts
        self._rows: Rows = {}
        self._next = 0

    def take(self, n: int) -> Rows:
        """The next `n` rows."""
        taken: list[Rows] = []
        while n > 0:
            left = len(next(iter(self._rows.values()))) - self._next if self._rows else 0
            if not left:
                self._rows, self._next = next(self._parts), 0
                continue
            start, self._next = self._next, self._next + min(n, left)
            taken.append({name: values[start : self._next] for name, values in self._rows.items()})
            n -= self._next - start
        return _concatenate(taken)


def _concatenate(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


_OWN = (*_KEYS, "logprob", "trainer_logprob", "sequence")


def _pair(sequences: PassSequences, rows: Rows, off_policy_why: str) -> PairArrays:
    nothing = np.empty(0)
    rollout, trainer = (rows.get(name, nothing).astype(np.float64) for name in ("logprob", "trainer_logprob"))
    sequence, position = (rows.get(name, nothing).astype(np.int64, copy=False) for name in ("sequence", "position"))
    return PairArrays(
        rollout_logprob=rollout,
        trainer_logprob=trainer,
        sequence=sequence,
        position=position,
        prompt=sequences.prompt,
        prompt_ids=sequences.prompt_ids,
        on_policy=not off_policy_why,
        off_policy_why=off_policy_why,
        columns={name: values for name, values in rows.items() if name not in _OWN},
        usable=usable(rollout, trainer, sequence, position, rows.get(WEIGHT_VERSION)),
    )


def exact_rows(run: PassTables, rollout_pass: str, trainer_pass: str, sums: PairSums) -> ExactRows | None:
    """The positions at which a trainer pass compared its rows with those that a rollout pass kept; None without any.

    Args:
        run: Whose tables.
        rollout_pass: The pass that kept rows.
        trainer_pass: The pass that compared them.
        sums: Of the pair, for the number of tokens and sequences of each prompt.

    Raises:
        TableError: The table is missing or corrupt.
    """
    table = _compared(run, rollout_pass, trainer_pass)
    if table is None:
        return None
    sequences = pass_sequences(run, rollout_pass)
    of = sums.sequences
    sequence = np.searchsorted(sequences.ids, table["sequence_id"].to_numpy())
    known = table["drift_sketch"].is_valid().to_numpy()
    sketches = np.full((len(known), DRIFT_BUCKETS), np.nan, np.float32)
    sketches[known] = table["drift_sketch"].combine_chunks().drop_null().flatten().to_numpy().reshape(-1, DRIFT_BUCKETS)
    return ExactRows(
        values={name: table[name].to_numpy() for name in DIVERGENCES},
        weight=table["weight"].to_numpy(),
        stands_for=table["stands_for"].to_numpy(),
        prompt=sequences.prompt[sequence],
        sequence=sequence,
        tokens=group_sums(of.prompt, of.length, sums.n_prompts),
        sequences=np.bincount(of.prompt, minlength=sums.n_prompts).astype(np.float64),
        drift_square=table["drift_square"].to_numpy() if known.any() else None,
        drift_sketch=sketches if known.any() else None,
    )


def _compared(run: PassTables, rollout_pass: str, trainer_pass: str) -> pa.Table | None:
    """The rows of `exact_rows`; None without any."""
    table = run.exact(trainer_pass)
    if table is None:
        return None
    table = table.filter(pc.equal(table["rollout_pass"].cast(pa.string()), rollout_pass))
    return table if table.num_rows else None


def _with_entropies(chunks: Iterator[PairArrays], sequences: PassSequences, compared: pa.Table) -> Iterator[PairArrays]:
    """The same chunks, with the entropy of the rollout at the positions that were compared."""
    index = np.searchsorted(sequences.ids, compared["sequence_id"].to_numpy())
    keys = _place(index, compared["position"].to_numpy())
    order = np.argsort(keys)
    keys, entropy = keys[order], compared["entropy_rollout"].to_numpy()[order]
    for chunk in chunks:
        column = np.full(len(chunk.sequence), np.nan)
        tokens = _place(chunk.sequence, chunk.position)
        if len(tokens):
            at = np.minimum(np.searchsorted(keys, tokens), len(keys) - 1)
            found = keys[at] == tokens
            column[found] = entropy[at[found]]
        yield replace(chunk, columns={**chunk.columns, "rollout_entropy": column})


def _place(sequence: NDArray[np.int64], position: NDArray[Any]) -> NDArray[np.int64]:
    """`[N]` one number for sequence and position, which sorts as both do."""
    return np.asarray(sequence * (1 << 32) + position, dtype=np.int64)


def self_noise_of(run: PassTables, pass_id: str, self_noise_pass: str) -> SelfNoise:
    """How far a pass is from itself: the tokens that both runs of it produced, compared where their ids agree."""
    columns = [*_KEYS, "logprob"]
    again = _concatenate([_arrays(batch) for batch in run.iter_tokens(self_noise_pass, columns)] or [_no_rows(columns)])
    ids = np.unique(again["sequence_id"])
    # The repeat has a few sequences; only those of the pass are kept.
    repeated = pa.array(ids)
    batches = run.iter_tokens(pass_id, columns, ids=_bounds(ids))
    kept = [_arrays(batch.filter(pc.is_in(batch["sequence_id"], value_set=repeated))) for batch in batches]
    first = _concatenate(kept or [_no_rows(columns)])
    key, wanted = (_place(rows["sequence_id"], rows["position"]) for rows in (first, again))
    # A repeat that went another way can be longer than the first run; only positions that both have can be compared.
    shared = np.isin(wanted, key)
    rows = np.searchsorted(key, wanted[shared])
    return self_noise(
        first["token_id"][rows],
        first["logprob"][rows].astype(np.float64),
        again["token_id"][shared],
        again["logprob"][shared].astype(np.float64),
        again["sequence_id"][shared],
    )


def _arrays(batch: pa.Table, special_ids: Sequence[int] = ()) -> Rows:
    """A batch's columns; texts, which are few, become what their tokens are made of."""
    rows = {name: batch[name].to_numpy() for name in batch.column_names if name != "token_text"}
    if "token_text" in batch.column_names:
        texts = batch["token_text"].combine_chunks()
        kinds = np.array([kind_of(text) for text in texts.dictionary.to_pylist()] or [0], np.int8)
        known = texts.is_valid().to_numpy(zero_copy_only=False)
        codes = np.where(known, kinds[texts.indices.fill_null(0).to_numpy()], KINDS.index("unknown"))
        special = np.isin(rows["token_id"], np.asarray(special_ids, np.int64))
        rows["token_kind"] = np.where(special, KINDS.index("special"), codes).astype(np.float64)
    return rows


def _no_rows(columns: Sequence[str]) -> Rows:
    return dict.fromkeys(columns, np.empty(0, dtype=np.int64))
