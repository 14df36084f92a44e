"""What the keys of an unknown record probably hold: the `--map` that reads it, and what none can read.

Names say whose log-probs they are, values what they are: ids are whole numbers, log-probs mostly below 0, and the
lengths of lists tell a response from a whole sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mismatch_probe.ingest.base import quoted
from mismatch_probe.ingest.keys import ATTENTION, LENGTH, NAMED, PROMPT, RESPONSE, WHOLE

# By key of the generic format, what a name like it holds, the best sign first.
_IDS = {
    PROMPT: r"prompt|query|context|input",
    RESPONSE: r"response|completion|output|generat|action|sampled",
    WHOLE: r"token|sequence|ids",
}
_LOGPROBS = {
    "rollout_prefill_logprobs": ("prefill",),
    "ref_logprobs": (r"(?:^|[_.])ref",),
    "rollout_logprobs": ("rollout", "infer", r"(?:^|[_.])gen", "sampl", "behav", "vllm", "sglang", "engine"),
    "trainer_logprobs": (
        "train",
        "learner",
        "prev",
        "old",
        "hf",
        "recomputed",
        "actor",
        "policy",
        "new",
        "current",
        "model",
    ),
}
_UPDATED = re.compile(r"new|current|policy|actor|model")
_OLD = re.compile(r"(?:^|[_.])old")
# Also lists of numbers below 0, of which some have the name of a side in theirs.
_NO_LOGPROBS = re.compile(r"adv|reward|return|loss|entropy|logit|kl|diff|score|ratio|(?:^|[_.])(?:value|delta|grad)")
_BARE = re.compile(r"(?:token_)?(?:log_?probs?|logps?|lps?)(?:_list|_values)?")
_NO_MASK = re.compile(r"attention|pad|prompt")
_SINGLE: dict[str, tuple[str, tuple[type, ...]]] = {
    "step": (r"step|iteration", (int,)),
    "prompt_id": (r"prompt_?(?:id|uid|idx|index)|group|uid", (int, str)),
    "reward": (r"reward|score", (int, float)),
    LENGTH: (r"(?:prompt|input|context)_(?:len|length|tokens|size)|num_prompt|n_prompt", (int,)),
}
_DEPTH, _MOST_COLUMNS, _LONGEST_NAME = 3, 1000, 200
Columns = dict[str, Any]


@dataclass(frozen=True)
class Suggestion:
    """What is probably meant.

    Attributes:
        map: By a record's own key, the key of the generic format; only keys that need a `--map`.
        unsure: Keys whose name does not say whose log-probs they hold.
        unreadable: What is there and no `--map` can read, in a sentence each.
    """

    map: dict[str, str]
    unsure: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def suggested(fields: Mapping[str, Any]) -> Suggestion:
    """What the keys of a record, and of objects in it, probably hold."""
    columns = _first_sequence(dict(_columns(fields)))
    found = {name: name for name in columns if name in NAMED}
    _name_ids(columns, found)
    unsure = _name_logprobs(columns, found) if found else ()
    _name_masks(columns, found)
    for ours, (pattern, types) in _SINGLE.items():
        named = [
            name
            for name, value in columns.items()
            if isinstance(value, types) and not isinstance(value, bool) and re.search(pattern, _plain(name))
        ]
        if named and (ours != LENGTH or WHOLE in found.values()):
            _put(found, named[0], ours)
    new = {theirs: ours for theirs, ours in found.items() if theirs != ours}
    has_ids = set(found.values()) & {PROMPT, RESPONSE, WHOLE}
    return Suggestion(new if has_ids else {}, unsure, tuple(_unreadable(columns)))


def _columns(fields: Mapping[str, Any], before: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """The keys of a record and, as `outer.inner`, of the objects in it."""
    for name, value in list(fields.items())[:_MOST_COLUMNS]:
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME or "," in name:
            continue  # no --map can be typed for it
        if isinstance(value, Mapping):
            if depth:
                yield from _columns(value, f"{before}{name}.", depth - 1)
        else:
            yield f"{before}{name}", value.item() if isinstance(value, np.generic) else value


def _first_sequence(columns: Columns) -> Columns:
    """Of a dict of columns, the values of its first sequence."""
    lists = {name: _values(value) for name, value in columns.items()}
    nested = [name for name, values in lists.items() if values and all(_values(one) is not None for one in values)]
    if not any(_is_ids(_values(lists[name][0])) for name in nested):  # type: ignore[index]
        return columns
    n = len(lists[nested[0]] or ())
    return {name: columns[name] if values is None or len(values) != n else values[0] for name, values in lists.items()}


def _values(value: Any) -> list[Any] | None:
    """The values of a list; those of a 2-D array are lists."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value.tolist())
    return list(value) if isinstance(value, list | tuple) else None


def _plain(name: str) -> str:
    """In small letters, with an underscore between the words of camelCase."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _put(found: dict[str, str], theirs: str, ours: str) -> None:
    if theirs not in found and ours not in found.values():
        found[theirs] = ours


def _name_ids(columns: Columns, found: dict[str, str]) -> None:
    ids = [name for name, value in columns.items() if _is_ids(_values(value)) and name not in found]
    ids = [name for name in ids if not re.search(r"mask|position|version|turn|len", _plain(name))]
    for ours, pattern in _IDS.items():
        named = [name for name in ids if re.search(pattern, _plain(name.rpartition(".")[2])) and name not in found]
        named = named or [name for name in ids if re.search(pattern, _plain(name)) and name not in found]
        if named and (ours != WHOLE or RESPONSE not in found.values()):
            _put(found, named[0], ours)
    theirs = {ours: theirs for theirs, ours in found.items()}
    if RESPONSE in theirs or not {PROMPT, WHOLE} & theirs.keys():
        return
    if WHOLE not in theirs:  # ids of which nothing says that they are the response's
        along = len(_values(columns[theirs[PROMPT]]) or ())
        if any(_is_logprobs(values) and len(values) == along for values in map(_values, columns.values()) if values):
            found[theirs[PROMPT]] = WHOLE
    elif PROMPT in theirs:
        prompt, whole = (_values(columns[theirs[name]]) or [] for name in (PROMPT, WHOLE))
        if whole[: len(prompt)] != prompt:
            found[theirs[WHOLE]] = RESPONSE


def _name_logprobs(columns: Columns, found: dict[str, str]) -> tuple[str, ...]:
    """Names the lists of log-probs; which of them have a name that does not say whose they are."""
    names = [name for name, value in columns.items() if _is_logprobs(_values(value)) and name not in found]
    names = [name for name in names if not _NO_LOGPROBS.search(_plain(name))]
    signs: dict[str, list[tuple[int, str]]] = {ours: [] for ours in _LOGPROBS}
    bare = []
    for name in names:
        ours, rank = _side(name)
        if ours:
            signs[ours].append((rank, name))
        elif _BARE.fullmatch(_plain(name.rpartition(".")[2])):
            bare.append(name)
    of = {ours: [name for _, name in sorted(each)] for ours, each in signs.items()}
    unsure: list[str] = []
    trainer = of["trainer_logprobs"]
    if not of["rollout_logprobs"]:
        old = [name for name in trainer if _OLD.search(_plain(name))] if len(trainer) > 1 else []
        of["rollout_logprobs"] = unsure = bare[:1] or old[:1]
        of["trainer_logprobs"] = trainer = [name for name in trainer if name not in unsure]
    for ours, each in of.items():
        if each:
            _put(found, each[0], ours)
    if len(trainer) > 1 and _UPDATED.search(_plain(trainer[1])):
        _put(found, trainer[1], "trainer_logprobs_2")
    return tuple(name for name in unsure if found.get(name) == "rollout_logprobs")


def _side(name: str) -> tuple[str, int]:
    """Whose log-probs a name says they are, and the place of its sign; the last part of the name says it first."""
    for text in (_plain(name.rpartition(".")[2]), _plain(name)):
        for ours, known in _LOGPROBS.items():
            signs = [rank for rank, sign in enumerate(known) if re.search(sign, text)]
            if signs:
                return ours, signs[0]
    return "", 0


def _name_masks(columns: Columns, found: dict[str, str]) -> None:
    main = next((theirs for theirs, ours in found.items() if ours in (RESPONSE, WHOLE)), None)
    if main is None:
        return
    n = len(_values(columns[main]) or ())
    for name, value in columns.items():
        values, plain = _values(value), _plain(name)
        if "mask" in plain and values and all(one in (0, 1) for one in values):
            if not _NO_MASK.search(plain) and len(values) == n:
                _put(found, name, "loss_mask")
            elif "attention" in plain:
                _put(found, name, ATTENTION)


def _unreadable(columns: Columns) -> Iterator[str]:
    """Lists that look like what is missing, and in which form they are."""
    for name, value in columns.items():
        values, plain, said = _values(value) or [], _plain(name), quoted(name)[1:-1]
        logprobs = bool(re.search(r"log_?p|(?:^|_)lps?$", plain))
        if values and all(isinstance(one, Mapping) for one in values):
            inside = ", ".join(quoted(str(key))[1:-1] for key in list(values[0])[:4])
            yield f"{said} is a list of objects ({inside}), and --map names lists of numbers only"
        elif values and all(isinstance(one, str) for one in values) and (logprobs or re.search(r"token|ids", plain)):
            yield f"{said} is a list of text, not of numbers"
        elif re.search(r"prob", plain) and _is_probabilities(values):
            yield f"{said} holds probabilities, not log-probs: write their natural logarithm"


def _is_ids(values: list[Any] | None) -> bool:
    return bool(values) and all(type(one) is int and one >= 0 for one in values or ()) and max(values or [0]) > 1


def _is_logprobs(values: list[Any] | None) -> bool:
    held = [one for one in values or () if one is not None]
    numbers = bool(held) and {int, float}.issuperset(map(type, held)) and float in map(type, held)
    return numbers and sum(one <= 0 for one in held) > len(held) / 2


def _is_probabilities(values: list[Any]) -> bool:
    held = [one for one in values if one is not None]
    numbers = bool(held) and {int, float}.issuperset(map(type, held)) and float in map(type, held)
    return numbers and all(0 <= one <= 1 for one in held) and any(one > 0 for one in held)
