"""Turns of a conversation as rows: those that continue one another are one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.base import Record, Row
from mismatch_probe.ingest.keys import KEYS, PROMPT, RESPONSE
from mismatch_probe.ingest.values import list_of, per_row

Ids = NDArray[Any]


@dataclass(frozen=True)
class Turn:
    """One call of the model.

    Attributes:
        prompt: Ids that it saw, of all turns before it too.
        response: Ids that it sampled.
        logprobs: Of these, nats; None where none were recorded.
        number: Its place in the conversation.
        mask: Which of its tokens count; all where it is None.
        version: Weights that sampled it; None where that is not recorded.
    """

    prompt: Ids
    response: Ids
    logprobs: NDArray[np.float64] | None
    number: int
    mask: Ids | None = None
    version: int | None = None


def turn_of(record: Record, keys: tuple[str, str, str], number: int, mask: str = "", version: str = "") -> Turn:
    """A turn, of the keys of its prompt, response and log-probs, and of its mask and version where it has them.

    Raises:
        IngestError: It has no ids, or a value is of another kind.
    """
    prompt, response, logprobs = keys
    values = record.fields.get(logprobs)
    flags, weights = record.fields.get(mask), record.fields.get(version)
    return Turn(
        list_of(record, PROMPT, record.need(prompt)),
        list_of(record, RESPONSE, record.need(response)),
        None if not values else list_of(record, "rollout_logprobs", values),
        number,
        None if flags is None else list_of(record, "loss_mask", flags),
        None if weights is None else per_integer(record, weights),
    )


def per_integer(record: Record, value: Any) -> int:
    """A version of weights.

    Raises:
        IngestError: It is something else than an integer.
    """
    found = per_row(record, KEYS["weight_version"], value)
    return found if isinstance(found, int) else -1


def joined(turns: Sequence[Turn]) -> Iterator[dict[str, Any]]:
    """A row for each run of turns of which each one's prompt begins with all tokens before it.

    What lies between two responses, of a tool or a user, is masked and has no log-prob. Where a prompt rewrites its
    history, another row begins.
    """
    run: list[Turn] = []
    seen = np.empty(0, np.int64)
    for turn in turns:
        if run and not np.array_equal(turn.prompt[: len(seen)], seen):
            yield _row(run)
            run = []
        run.append(turn)
        seen = np.concatenate([turn.prompt, turn.response])
    if run:
        yield _row(run)


def _row(run: list[Turn]) -> dict[str, Any]:
    parts: dict[str, list[NDArray[Any]]] = {key: [] for key in (RESPONSE, "loss_mask", "turn", "weight_version")}
    logprobs: list[NDArray[Any]] = []
    sound = all(turn.logprobs is not None and len(turn.logprobs) == len(turn.response) for turn in run)
    n_seen = len(run[0].prompt)
    for turn in run:
        between, n = turn.prompt[n_seen:], len(turn.response)
        n_seen = len(turn.prompt) + n
        parts[RESPONSE] += [between, turn.response]
        parts["loss_mask"] += [np.zeros(len(between)), np.ones(n) if turn.mask is None else turn.mask]
        parts["turn"] += [np.full(len(between) + n, turn.number, np.int64)]
        version = -1 if turn.version is None else turn.version
        parts["weight_version"] += [np.full(len(between), -1, np.int64), np.full(n, version, np.int64)]
        # Values of a wrong number stay as they are, so that the collector accounts for them.
        logprobs += [
            np.full(len(between) if sound else 0, np.nan),
            np.empty(0) if turn.logprobs is None else turn.logprobs,
        ]
    if all(turn.version is None for turn in run):
        del parts["weight_version"]
    row = {key: np.concatenate(values) for key, values in parts.items()}
    if any(turn.logprobs is not None for turn in run):
        row["rollout_logprobs"] = np.concatenate(logprobs)
    return {PROMPT: run[0].prompt, **row}


def rows_with(turns: Sequence[Turn], **values: Any) -> Iterator[Row]:
    """The rows of turns, each with values of their rollout."""
    for row in joined(turns):
        yield {**row, **values}
