"""What the tables of a run directory hold: their schemas, and the tables that passes make.

A file of an earlier release may miss the columns of `OPTIONAL`, and so may what an engine gives; they are then null
throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mismatch_probe.errors import TableError
from mismatch_probe.types import DIVERGENCES, DRIFT_BUCKETS, Rollout, RolloutRequest, Score

_TEXT = pa.dictionary(pa.int32(), pa.string())

SEQUENCES_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("prompt_id", _TEXT),
        ("sample_id", pa.int32()),
        ("rollout_pass", _TEXT),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("finish_reason", _TEXT),
        ("text", pa.string()),
        ("step", pa.int64()),
    ]
)
TOKENS_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("pass_id", _TEXT),
        ("logprob", pa.float32()),
        ("token_text", _TEXT),
        ("entropy", pa.float32()),
        ("rank", pa.int32()),
    ]
)
# Passes that serve as a reference keep all digits, in a table of their own.
REFERENCE_SCHEMA = TOKENS_SCHEMA.set(TOKENS_SCHEMA.get_field_index("logprob"), pa.field("logprob", pa.float64()))
EXACT_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("position", pa.int32()),
        ("rollout_pass", _TEXT),
        ("pass_id", _TEXT),
        ("weight", pa.float64()),
        ("stands_for", pa.float64()),
        *((name, pa.float64()) for name in DIVERGENCES),
        ("drift_square", pa.float64()),
        ("drift_sketch", pa.list_(pa.float32(), DRIFT_BUCKETS)),
    ]
)

# Columns that earlier releases did not write, or that not every engine gives.
OPTIONAL = ("step", "entropy", "rank", "drift_square", "drift_sketch")
# By sequence, which of its response tokens count.
Masks = Mapping[int, NDArray[np.bool_]]


def _dictionary(values: Sequence[str | None]) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode().cast(_TEXT)


def _constant(value: str, length: int) -> pa.Array:
    """A dictionary-encoded column of one value, without a Python object per row."""
    return pa.DictionaryArray.from_arrays(np.zeros(length, np.int32), pa.array([value], pa.string()))


def sequences_table(
    rollout_pass: str,
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    prompt_ids: Sequence[str],
    sample_ids: Sequence[int],
    steps: Sequence[int] | None = None,
) -> pa.Table:
    """One row per sequence; the sequences run in parallel and have one length. `steps` are training steps."""
    return pa.table(
        {
            "sequence_id": pa.array([r.sequence_id for r in requests], pa.int64()),
            "prompt_id": _dictionary(prompt_ids),
            "sample_id": pa.array(sample_ids, pa.int32()),
            "rollout_pass": _constant(rollout_pass, len(requests)),
            "prompt_token_ids": pa.array([r.prompt_token_ids for r in requests], pa.list_(pa.int32())),
            "response_token_ids": pa.array([np.asarray(r.response_token_ids) for r in rollouts], pa.list_(pa.int32())),
            "finish_reason": _dictionary([r.finish_reason for r in rollouts]),
            "text": pa.array([r.text for r in rollouts], pa.string()),
            "step": pa.array([None] * len(rollouts) if steps is None else steps, pa.int64()),
        },
        schema=SEQUENCES_SCHEMA,
    )


def tokens_table(
    pass_id: str,
    items: Iterable[Rollout | Score],
    token_ids: Callable[[Any], Sequence[int] | NDArray[np.int32]],
    token_text: Callable[[int], str | None] = lambda _: None,
    schema: pa.Schema = TOKENS_SCHEMA,
    masks: Masks | None = None,
) -> pa.Table:
    """One row per response token, sorted by sequence and position.

    Args:
        pass_id: What was run, e.g. `"vllm-bfloat16-decode"`.
        items: Sequences with `sequence_id` and `logprobs` (nats, one per token).
        token_ids: The response ids of an item, as long as its `logprobs`.
        token_text: The text of a token id, where known.
        schema: `TOKENS_SCHEMA`, or `REFERENCE_SCHEMA` to keep float64 log-probs.
        masks: Which response tokens get a row, by sequence; None for all.
    """
    ordered = sorted(items, key=lambda item: item.sequence_id)
    ids = [np.asarray(token_ids(item), dtype=np.int32) for item in ordered]
    for item, tokens in zip(ordered, ids, strict=True):
        if len(tokens) != len(item.logprobs):
            raise TableError(
                f"Pass {pass_id} returned {len(item.logprobs)} log-probs for the {len(tokens)} tokens of "
                f"sequence {item.sequence_id}.",
                "Report this fault of the engine or its adapter.",
            )
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    flat = np.concatenate([np.empty(0, np.int32), *ids])
    vocabulary, index = np.unique(flat, return_inverse=True)
    texts = _dictionary([token_text(token) for token in vocabulary.tolist()])
    table = pa.table(
        {
            "sequence_id": np.repeat(np.array([item.sequence_id for item in ordered], dtype=np.int64), lengths),
            "position": np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)]),
            "token_id": flat,
            "pass_id": _constant(pass_id, len(flat)),
            "logprob": _joined([item.logprobs for item in ordered], schema.field("logprob").type),
            "token_text": texts.take(pa.array(index)),
            "entropy": _optional_column([getattr(item, "entropy", None) for item in ordered], len(flat), pa.float32()),
            "rank": _optional_column([getattr(item, "rank", None) for item in ordered], len(flat), pa.int32()),
        },
        schema=schema,
    )
    if masks is None:
        return table
    return table.filter(np.concatenate([np.empty(0, np.bool_), *(masks[item.sequence_id] for item in ordered)]))


def exact_table(
    pass_id: str, sources: Sequence[str], scores: Iterable[Score], masks: Masks | None = None
) -> pa.Table | None:
    """What a trainer pass compared of the rows that rollout passes kept; None where it compared none.

    Args:
        pass_id: The trainer pass.
        sources: Rollout pass of each `source` in the scores' columns.
        scores: Of the pass.
        masks: Which response tokens count, by sequence; None for all.
    """
    parts = [score.exact for score in scores if score.exact is not None]
    if not parts:
        return None
    places, scalars = ("source", "sequence_id", "position"), ("weight", "stands_for", *DIVERGENCES)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in (*places, *scalars)}
    order = np.lexsort((columns["position"], columns["sequence_id"], columns["source"]))
    if masks is not None:
        at = zip(columns["sequence_id"][order].tolist(), columns["position"][order].tolist(), strict=True)
        order = order[np.array([bool(masks[sequence][position]) for sequence, position in at], np.bool_)]
    source = pa.DictionaryArray.from_arrays(columns["source"][order].astype(np.int32), pa.array(sources, pa.string()))
    optional = {
        field.name: _optional_column([part.get(field.name) for part in parts], len(columns["source"]), field.type)
        for field in EXACT_SCHEMA
        if field.name in OPTIONAL
    }
    return pa.table(
        {
            "sequence_id": columns["sequence_id"][order],
            "position": columns["position"][order].astype(np.int32),
            "rollout_pass": source,
            "pass_id": _constant(pass_id, len(order)),
            **{name: columns[name][order].astype(np.float64) for name in scalars},
            **{name: column.take(pa.array(order)) for name, column in optional.items()},
        },
        schema=EXACT_SCHEMA,
    )


def _joined(parts: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(np.concatenate([np.empty(0), *(np.asarray(part, np.float64) for part in parts)])).cast(kind)


def _optional_column(parts: Sequence[Any], length: int, kind: pa.DataType) -> pa.Array:
    """A column that an item may miss; then it is null throughout. Parts `[N, B]` make lists of fixed length B."""
    if not parts or any(part is None for part in parts):
        return pa.nulls(length, kind)
    joined = np.concatenate(parts)
    if joined.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(joined.ravel()), joined.shape[1]).cast(kind)
    return pa.array(joined).cast(kind)
