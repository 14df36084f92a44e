"""What a reader hands on, a recorded run in columns, and how it says no: which row, what is wrong, what to write.

Shape legend: `S` sequences, `N` response tokens of all sequences, `M` prompt tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import IngestError
from mismatch_probe.results.manifest import Source

Side = Literal["rollout", "trainer"]
T = TypeVar("T", bound=np.generic)
_LONGEST_NAME = 60
_MOST_NAMES = 20
TEXT_KEYS = frozenset(
    {"prompt", "prompts", "response", "responses", "completion", "completions", "input", "output"}
) | {
    "messages",
    "text",
}
_KINDS = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
    dict: "an object",
    list: "a list",
}


@dataclass(frozen=True)
class Ragged(Generic[T]):
    """Lists of differing length in one flat array.

    Attributes:
        values: All lists one after another.
        offsets: `[S+1]` int64; list `i` is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: NDArray[T]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[T]:
        """List `index`, as a view.

        Raises:
            IndexError: `index` is not one of 0 … S−1.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[T]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[S]` int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class RecordedRun:
    """Sequences that another program sampled, in the order of its file, with the log-probs that it wrote down.

    Everything per response token shares the offsets of `response_token_ids`. Non-finite log-probs stay as they are.
    At least one side is there, and a side is there for all sequences or for none. Every sequence has a response token,
    and at least one token of the run is not masked.

    Attributes:
        prompt_token_ids: `[M]` int32; a prompt may be empty.
        response_token_ids: `[N]` int32.
        rollout_logprobs: `[N]` b_t = log μ(y_t) in nats, float32 or float64 as in the file; None when not recorded.
        trainer_logprobs: `[N]` a_t = log π(y_t) likewise.
        loss_mask: `[N]` bool, True for the tokens that count; None when all do.
        step: `[S]` int64, the training step, negative ones allowed; None when not recorded.
        prompt_ids: `[S]` names of the prompts: the file's own `prompt_id`, else a digest of the prompt's token ids, so
            that equal prompts are one cluster of an interval.
        sample_ids: `[S]` int32, running number of the sequence within its prompt.
        finish_reasons: `[S]` the file's own, empty where it gives none.
        rows: `[S]` int64, the sequence's line (JSONL) or row (parquet) in the file, from 1.
        source: Facts for a manifest.
    """

    prompt_token_ids: Ragged[np.int32]
    response_token_ids: Ragged[np.int32]
    rollout_logprobs: Ragged[np.floating[Any]] | None
    trainer_logprobs: Ragged[np.floating[Any]] | None
    loss_mask: Ragged[np.bool_] | None
    step: NDArray[np.int64] | None
    prompt_ids: tuple[str, ...]
    sample_ids: NDArray[np.int32]
    finish_reasons: tuple[str, ...]
    rows: NDArray[np.int64]
    source: Source

    def __len__(self) -> int:
        return len(self.response_token_ids)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides whose log-probs are recorded: one or both."""
        recorded: tuple[tuple[Side, object], ...] = (
            ("rollout", self.rollout_logprobs),
            ("trainer", self.trainer_logprobs),
        )
        return tuple(side for side, values in recorded if values is not None)


@dataclass(frozen=True)
class Place:
    """The file being read, and what its rows are called.

    Attributes:
        name: The path as the user gave it.
        row_word: `"Line"` or `"Row"`.
    """

    name: str
    row_word: str

    def refuse(self, row: int, what: str, fix: str) -> NoReturn:
        """Ends the reading at a row, counted from 1."""
        raise IngestError(f"{self.row_word} {row} of {self.name} {what}.", fix)

    def refuse_file(self, what: str, fix: str) -> NoReturn:
        """Ends the reading where no single row is at fault."""
        raise IngestError(f"The file {self.name} {what}.", fix)


def quoted(text: str) -> str:
    """Text from a foreign file, safe to print: escaped, on one line, and not longer than a name should be."""
    return repr(text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "…")


def quoted_list(names: Iterable[str]) -> str:
    """At most 20 names, then how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _MOST_NAMES
    listed = ", ".join(quoted(name) for name in ordered[:_MOST_NAMES])
    return (listed or "none") + (f" and {more} more" if more > 0 else "")


def kind(value: Any) -> str:
    """What a value is, in words that do not repeat its content."""
    return _KINDS.get(type(value), type(value).__name__)


def missing_key(key: str, found: Iterable[str], text: bool) -> tuple[str, str]:
    """What and fix for a row or file without token ids; `text` when it holds text in their place."""
    if text:
        return (
            f"has text but no {key}",
            "Encoding text again can give other ids than were sampled: record prompt_token_ids and response_token_ids.",
        )
    return f"has no {key}; its keys are {quoted_list(found)}", f"Write {key} as a list of token ids."


def wrong_length(key: str, length: int, prompt: int, response: int) -> tuple[str, str]:
    """What and fix for a list that does not run along the response, with a guess at the usual off-by-some."""
    what = f"has {length} {key} for {response} response_token_ids"
    if not response:
        fix = "Record the ids of the response, or leave the row out."
    elif prompt and length == prompt + response:
        fix = f"They seem to cover prompt and response: leave out the first {prompt}, of the prompt."
    elif prompt and length == prompt + response - 1:
        fix = f"They seem to cover prompt and response without the first token: keep the last {response}."
    elif length == response - 1:
        fix = "One value is missing: the first response token and the last one (such as end-of-sequence) each need one."
    elif key == "loss_mask":
        fix = "Write one 0 or 1 per response token."
    else:
        fix = "Write one log-prob per response token, and null where there is none."
    return what, fix
