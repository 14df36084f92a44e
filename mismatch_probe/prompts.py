"""Prompt sets: the built-in one and the user's own, checked line by line before any engine starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mismatch_probe.errors import PromptError
from mismatch_probe.files import data_path
from mismatch_probe.types import Prompt

BUILT_IN = "built-in"
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: The prompts taken, at least one, with unique ids.
        source: `"built-in"`, or the path as the user gave it.
        sha256: Digest of the whole file's bytes, whatever part of it was taken.
    """

    prompts: tuple[Prompt, ...]
    source: str
    sha256: str


def load_prompts(source: str | Path | None = None, limit: int | None = None) -> PromptSet:
    """Reads a prompt set; the built-in one has 96 prompts of five categories, interleaved.

    Args:
        source: None for the built-in set, else a `.jsonl` file (`{"prompt": text or messages}` or `{"messages": […]}`,
            optional `id`, `category`, `answer`, other keys ignored) or a `.txt` file (one prompt per line). Blank lines
            are skipped in both; a prompt without an id is named after its line.
        limit: How many prompts to take from the start; None takes all.

    Raises:
        PromptError: The file cannot be read, one of its lines is no prompt, or it holds fewer prompts than asked for.
    """
    path = data_path("prompts.jsonl") if source is None else Path(source).expanduser()
    name = BUILT_IN if source is None else str(source)
    parse = {".jsonl": _from_json, ".txt": _from_text}.get(path.suffix.lower())
    if parse is None:
        raise PromptError(
            f"The prompt file {name} has the suffix {path.suffix!r}; supported are .jsonl and .txt.",
            "Use .jsonl for one JSON object per line, or .txt for one prompt per line.",
        )
    content = _read(path, name)
    prompts = _parse_lines(content, name, parse)
    if not prompts:
        raise PromptError(f"The prompt file {name} has no prompts.", "Write one prompt per line.")
    if limit is not None and not 1 <= limit <= len(prompts):
        raise PromptError(
            f"--num-prompts {limit} is outside 1 to {len(prompts)}, the size of the prompt set {name}.",
            "Lower --num-prompts, or give a larger file.",
        )
    return PromptSet(tuple(prompts[:limit]), name, hashlib.sha256(content).hexdigest())


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PromptError(f"The prompt file {name} does not exist.", "Check its path.") from None
    except OSError as error:
        raise PromptError(
            f"The prompt file {name} cannot be read: {error.strerror}.", "Check its permissions."
        ) from None


@dataclass(frozen=True)
class _Line:
    """A line on its way to a prompt, which knows where it stands so that every refusal can say so."""

    source: str
    number: int
    text: str

    def refuse(self, what: str, fix: str) -> NoReturn:
        raise PromptError(f"Line {self.number} of {self.source} {what}.", fix)


def _parse_lines(content: bytes, name: str, parse: Callable[[_Line], Prompt]) -> list[Prompt]:
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    # Bytes are split at \n alone: str.splitlines would also split at U+2028, which JSON allows inside a string.
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = _Line(name, number, raw.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError:
            _Line(name, number, "").refuse("is not valid UTF-8", "Save the file in the encoding UTF-8.")
        if not line.text.strip():
            continue
        prompt = parse(line)
        if prompt.prompt_id in line_of:
            first = line_of[prompt.prompt_id]
            line.refuse(f"repeats the id {prompt.prompt_id!r} of line {first}", "Give every prompt an id of its own.")
        line_of[prompt.prompt_id] = number
        prompts.append(prompt)
    return prompts


def _from_text(line: _Line) -> Prompt:
    return Prompt(prompt_id=f"line-{line.number}", text=line.text)


def _from_json(line: _Line) -> Prompt:
    example = 'Write for example {"prompt": "The sky is"}.'
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        line.refuse(f"is not valid JSON ({reason})", example)
    if not isinstance(record, dict):
        line.refuse("is not a JSON object", example)
    prompt, messages = record.get("prompt"), record.get("messages")
    if prompt is None and messages is None:
        line.refuse("has neither a prompt nor messages", example)
    if prompt is not None and messages is not None:
        line.refuse("has both a prompt and messages", "Keep one of the two.")
    text, chat = None, None
    if isinstance(prompt, str):
        text = _checked(line, prompt, "prompt")
    elif messages is None and not isinstance(prompt, list):
        line.refuse("has a prompt that is neither text nor a list of chat messages", example)
    else:
        chat = _chat(line, prompt if messages is None else messages)
    return Prompt(
        prompt_id=_label(line, record, "id", (str, int)) or f"line-{line.number}",
        text=text,
        messages=chat,
        category=_label(line, record, "category", (str,)) or "",
        answer=_label(line, record, "answer", (str, int, float)),
    )


def _chat(line: _Line, messages: Any) -> tuple[dict[str, str], ...]:
    example = 'Write for example {"messages": [{"role": "user", "content": "Hello"}]}.'
    if not isinstance(messages, list) or not messages:
        line.refuse("has messages that are not a list of at least one message", example)
    checked = []
    for index, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            line.refuse(f"has a message {index} that is not an object with exactly role and content", example)
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            line.refuse(f"has a message {index} with the role {role!r}", f"Use one of {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            line.refuse(f"has a message {index} whose content is not text", example)
        checked.append({"role": role, "content": _checked(line, message["content"], f"message {index}")})
    return tuple(checked)


def _checked(line: _Line, text: str, what: str) -> str:
    if not text.strip():
        line.refuse(f"has an empty {what}", "Write text into it, or delete the line.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        line.refuse(f"has a {what} with an unpaired surrogate escape", "Write the character itself, or its whole pair.")
    return text


def _label(line: _Line, record: dict[str, Any], key: str, kinds: tuple[type, ...]) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds):
        allowed = "text" if kinds == (str,) else "text or a number"
        line.refuse(f"has {key} {value!r}, which is not {allowed}", f"Write {key} as {allowed}, or leave it out.")
    return _checked(line, str(value), key)
