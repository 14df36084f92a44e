"""Rows of a case, and edits of them: pure functions, as faults of a pipeline change tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Side = Literal["b", "a"]
_NAMES = {"b": "rollout_logprobs", "a": "trainer_logprobs"}


@dataclass(frozen=True)
class Row:
    """A sequence of a dump.

    Attributes:
        prompt, response: Ids.
        b, a: Log-probs of rollout and trainer, one per response token, nats.
        keys: What else the generic format has of it, by its names; arrays per token, or one value.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    b: Floats
    a: Floats
    keys: dict[str, Any] = field(default_factory=dict)

    def with_keys(self, **keys: Any) -> Row:
        return replace(self, keys=self.keys | keys)

    def edited(self, side: Side, change: Callable[[Floats], Floats]) -> Row:
        """One side's log-probs changed."""
        return replace(self, b=change(self.b)) if side == "b" else replace(self, a=change(self.a))


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng((0xFA, *seed))


def some(rows: Sequence[Row], share: float, edit: Callable[[Row], Row], seed: int = 0) -> list[Row]:
    """The edit on a random share of the rows."""
    chosen = rng(seed).permutation(len(rows))[: round(share * len(rows))]
    return [edit(row) if i in set(chosen.tolist()) else row for i, row in enumerate(rows)]


def shifted(values: Floats, by: int) -> Floats:
    """Each value that of the token `by` places later; what has none keeps the last one's, or the first one's."""
    at = np.clip(np.arange(len(values)) + by, 0, len(values) - 1)
    return values[at]


def relabelled_packs(rows: Sequence[Row], pack: int, *, growing: bool) -> list[Row]:
    """Values of the trainer in packed rows of `pack` sequences, all labels behind the first sequence shifted by one, or
    by one more in each; what lies behind the pack's end is its last value.
    """
    found = []
    for start in range(0, len(rows), pack):
        group = rows[start : start + pack]
        flat = np.concatenate([row.a for row in group])
        begin = 0
        for index, row in enumerate(group):
            lag = index if growing else min(index, 1)
            at = np.clip(np.arange(begin, begin + len(row.a)) + lag, 0, len(flat) - 1)
            found.append(replace(row, a=flat[at]).with_keys(pack_id=start // pack, pack_index=index))
            begin += len(row.a)
    return found


def retokenised(row: Row, at: int, side: Side, fill: float = 0.0) -> Row:
    """From `at` on two tokens are one with their joint log-prob: one value less, and `fill` at the end."""

    def change(values: Floats) -> Floats:
        if at + 1 >= len(values):
            return values
        return np.concatenate([values[:at], [values[at] + values[at + 1]], values[at + 2 :], [fill]])

    return row.edited(side, change)


def last(row: Row, count: int, value: float) -> Row:
    """A placeholder for the last tokens' rollout log-probs."""
    b = row.b.copy()
    b[max(0, len(b) - count) :] = value
    return replace(row, b=b)


def scattered(row: Row, share: float, value: float, seed: int, run: int = 1) -> Row:
    """Placeholders inside: so large a share of the tokens, in runs of `run`."""
    b, draw = row.b.copy(), rng(seed)
    for start in range(0, len(b), run):
        if draw.random() < share:
            b[start : start + run] = value
    return replace(row, b=b)


def null_where_certain(row: Row, certain: float) -> Row:
    """No rollout log-prob where the token was nearly certain: above −`certain` nats."""
    return replace(row, b=np.where(row.b > -certain, np.nan, row.b))


def divided(row: Row, side: Side, temperature: float) -> Row:
    """The chosen log-prob divided after the softmax."""
    return row.edited(side, lambda values: values / temperature)


def decimals(row: Row, side: Side, count: int) -> Row:
    """Stored with so many decimals."""
    return row.edited(side, lambda values: np.round(values, count))


def stored_bf16(row: Row, side: Side) -> Row:
    """Stored in BF16: 8 significant bits, to nearest even."""

    def change(values: Floats) -> Floats:
        bits = np.asarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)

    return row.edited(side, change)


def inflated(row: Row, times: float) -> Row:
    """The rollout so many times as far from the trainer, in log-odds of the token, where no probability exceeds 1."""

    def odds(values: Floats) -> Floats:
        return values - np.log(-np.expm1(values))

    with np.errstate(divide="ignore", invalid="ignore"):
        theirs = odds(row.a) - times * (odds(row.a) - odds(row.b))
        b = -np.logaddexp(0.0, -theirs)
    return replace(row, b=np.where(np.isfinite(theirs), b, row.b))


def recomputed(row: Row) -> Row:
    return replace(row, b=row.a.copy())


def tail_from(row: Row, other: Floats, count: int) -> Row:
    """The last rollout log-probs of a length-capped row come from elsewhere."""
    if row.keys.get("finish_reason") != "length":
        return row
    b = row.b.copy()
    b[-count:] = other[-count:]
    return replace(row, b=b)


def document(row: Row) -> dict[str, Any]:
    """As a line of the generic format."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | list | tuple):
            return [plain(x) for x in value]
        if isinstance(value, float | np.floating):
            return float(f"{value:.9g}") if np.isfinite(value) else (None if np.isnan(value) else float(value))
        return int(value) if isinstance(value, np.integer) else value

    found = {"prompt_token_ids": row.prompt, "response_token_ids": row.response, _NAMES["b"]: row.b, _NAMES["a"]: row.a}
    return {name: plain(value) for name, value in (found | row.keys).items()}


def write(path: Path, rows: Sequence[Row]) -> None:
    """A file that is whole or not there."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as out:
        for row in rows:
            out.write(json.dumps(document(row)) + "\n")
    temporary.replace(path)
