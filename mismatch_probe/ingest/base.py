"""What readers share: a record and where it stands, and how they say no: which row, what is wrong, what to write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from mismatch_probe.errors import IngestError

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

Row = Mapping[str, Any]
"""A row of the generic format: by key of `keys.KEYS`, what JSON or numpy has there."""


@dataclass(frozen=True)
class Place:
    """The file being read, and what its rows are called.

    Attributes:
        name: The path as the user gave it, or of a file in the folder that the user gave.
        row_word: `"Line"`, `"Row"` or `"Sample"`.
    """

    name: str
    row_word: str

    def refuse(self, row: int, what: str, fix: str) -> NoReturn:
        """Ends the reading at a row, counted from 1."""
        raise IngestError(self.said(row, what), fix)

    def refuse_file(self, what: str, fix: str) -> NoReturn:
        """Ends the reading where no single row is at fault."""
        raise IngestError(f"The file {self.name} {what}.", fix)

    def said(self, row: int, what: str) -> str:
        """A sentence about a row."""
        return f"{self.row_word} {row} of {self.name} {what}."


@dataclass(frozen=True)
class Record:
    """What a framework wrote of a sequence, or of a batch of them.

    Attributes:
        fields: By the framework's own keys.
        place: The file.
        row: Line, row or sample, from 1.
        written_for: Project and version that its reader was written for.
    """

    fields: Mapping[str, Any]
    place: Place
    row: int
    written_for: str = ""

    def need(self, key: str) -> Any:
        """The value of a key.

        Raises:
            IngestError: The record does not have it.
        """
        if self.fields.get(key) is None:
            fix = f"The reader is for {self.written_for}, which writes it." if self.written_for else ""
            self.refuse(
                f"has no {key}; its keys are {quoted_list(self.fields)}", fix or f"Write {key} in every record."
            )
        return self.fields[key]

    def inside(self, key: str) -> Record:
        """What an object under a key holds, as a record of the same place.

        Raises:
            IngestError: The record does not have it, or it is something else than an object.
        """
        return self._part(key, self.need(key))

    def each(self, key: str) -> list[Record]:
        """What each object of a list under a key holds, as records of the same place.

        Raises:
            IngestError: The record does not have it, or it is something else than a list of objects.
        """
        value = self.need(key)
        if not isinstance(value, list | tuple):
            self.refuse(f"has {quoted(key)[1:-1]} that is {kind(value)}, not a list", self._written())
        return [self._part(f"{key}[{index}]", one) for index, one in enumerate(value)]

    def _part(self, name: str, value: Any) -> Record:
        if not isinstance(value, Mapping):
            self.refuse(f"has {quoted(name)[1:-1]} that is {kind(value)}, not an object", self._written())
        return replace(self, fields=value)

    def _written(self) -> str:
        return f"The reader is for {self.written_for}: was the file written by another version?"

    def refuse(self, what: str, fix: str) -> NoReturn:
        """Ends the reading at this record."""
        self.place.refuse(self.row, what, fix)


def quoted(text: str) -> str:
    """Text from a foreign file, safe to print: escaped, on one line, and not longer than a name should be."""
    return repr(text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "…")


def quoted_list(names: Iterable[Any]) -> str:
    """At most 20 names, then how many more there are."""
    ordered = sorted(map(str, names))
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


LengthReason = Literal["no-response", "with-prompt", "with-prompt-shifted", "one-missing", "other"]
"""What a list of another length probably is: `with-prompt` covers prompt and response, `with-prompt-shifted` all of
that but the first token, `one-missing` all of the response but one token; `no-response`: there is no response token."""


def length_reason(length: int, prompt: int, response: int) -> LengthReason:
    """Why a list probably does not run along the response.

    Args:
        length: Of the list.
        prompt: Prompt tokens, 0 where they are not known.
        response: Response tokens.
    """
    if not response:
        return "no-response"
    if prompt and length == prompt + response:
        return "with-prompt"
    if prompt and length == prompt + response - 1:
        return "with-prompt-shifted"
    return "one-missing" if length == response - 1 else "other"


def wrong_length(key: str, length: int, prompt: int, response: int) -> tuple[str, str]:
    """What and fix for a list that does not run along the response, with a guess at the usual off-by-some."""
    what = f"has {length} {key} for {response} response_token_ids"
    match length_reason(length, prompt, response):
        case "no-response":
            fix = "Record the ids of the response, or leave the row out."
        case "with-prompt":
            fix = f"They seem to cover prompt and response: leave out the first {prompt}, of the prompt."
        case "with-prompt-shifted":
            fix = f"They seem to cover prompt and response without the first token: keep the last {response}."
        case "one-missing":
            tokens = "the first response token and the last one (such as end-of-sequence)"
            fix = f"One value is missing: {tokens} each need one."
        case "other" if key == "loss_mask":
            fix = "Write one 0 or 1 per response token."
        case "other":
            fix = "Write one log-prob per response token, and null where there is none."
    return what, fix
