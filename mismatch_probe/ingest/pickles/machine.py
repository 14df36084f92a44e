"""A reader of pickles that cannot run code: opcodes make plain values and stand-ins, and nothing else.

Python's own `pickle` imports what a pickle names and calls it. Here a name stays a name, and what a pickle would call
or make becomes a `StandIn` that holds its arguments and its state. Only names that a caller gives a builder for become
something else, by that builder. Memory grows with the bytes of the pickle: the memo is a dict, nothing is sized by a
number that the pickle claims, and keys of dicts are plain, so that no hash of nested tuples is ever computed.

The opcodes are those of protocols 0 to 5 (https://docs.python.org/3/library/pickletools.html).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_KEYS = (str, int, float, bool, bytes, type(None))
# Runs of numbers, which are most of a pickle of token ids and log-probs; possessive, so that nothing is backtracked.
_FLOATS = re.compile(rb"(?:G.{8})++", re.DOTALL)
_INTEGERS = re.compile(rb"(?:K.|M..|J.{4})++", re.DOTALL)
_LONGEST_NUMBER = 4300


class PickleError(ValueError):
    """A pickle is truncated, damaged, or has what is not read."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    @property
    def full(self) -> str:
        """Module and name."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class StandIn:
    """What a pickle would make by a call.

    Attributes:
        made_by: Class or function.
        args: What it would be given.
        state: What its `__setstate__` or `__dict__` would be given.
        items: Its items, of a dict of its own class.
        elements: Its elements, of a list of its own class.
    """

    made_by: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)
    memo: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Builders:
    """What becomes of names that are known.

    Attributes:
        calls: By full name, what its call gives.
        states: By full name, what a stand-in with this state becomes.
        storage: What a persistent id stands for.
    """

    calls: Mapping[str, Callable[[tuple[Any, ...]], Any]]
    states: Mapping[str, Callable[[StandIn, Any], Any]] = field(default_factory=dict)
    storage: Callable[[Any], Any] | None = None


class Machine:
    """Reads pickles from bytes, one after another.

    Args:
        data: The bytes.
        builders: What becomes of known names.
        position: Where the first begins.
    """

    def __init__(self, data: bytes, builders: Builders, position: int = 0) -> None:
        self._data = data
        self._at = position
        self._builders = builders
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    @property
    def position(self) -> int:
        """Where the last pickle ended."""
        return self._at

    def load(self) -> Any:
        """The value of the next pickle.

        Raises:
            PickleError: It has an opcode that is not read, or ends early.
            ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError: It is damaged.
        """
        self._stack, self._outer, self._memo = [], [], {}
        return self._run()

    def _run(self) -> Any:
        data, operations = self._data, _OPERATIONS
        while True:
            opcode = data[self._at]
            if opcode in b"KMJ":
                self._integers()
                continue
            if opcode == 71:
                self._floats()
                continue
            self._at += 1
            if opcode == 46:
                return self._stack.pop()
            operation = operations.get(opcode)
            if operation is None:
                raise PickleError(f"it has the opcode {opcode:#04x}, which is not read")
            operation(self)

    # What is read ----------------------------------------------------------------------------------------------------

    def _take(self, n: int) -> bytes:
        start, self._at = self._at, self._at + n
        if n < 0 or self._at > len(self._data):
            raise PickleError("it is truncated")
        return self._data[start : self._at]

    def _size(self, n: int) -> int:
        """An unsigned little-endian number of `n` bytes."""
        return int.from_bytes(self._take(n), "little")

    def _sized(self, n: int) -> bytes:
        return self._take(self._size(n))

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise PickleError("it is truncated")
        line, self._at = self._data[self._at : end], end + 1
        return line

    def _integers(self) -> None:
        run = _INTEGERS.match(self._data, self._at)
        if run is None:
            raise PickleError("it is truncated")
        data, at, end = self._data, self._at, run.end()
        push = self._stack.append
        while at < end:
            kind = data[at]
            if kind == 75:
                push(data[at + 1])
                at += 2
            elif kind == 77:
                push(data[at + 1] | data[at + 2] << 8)
                at += 3
            else:
                push(int.from_bytes(data[at + 1 : at + 5], "little", signed=True))
                at += 5
        self._at = end

    def _floats(self) -> None:
        run = _FLOATS.match(self._data, self._at)
        if run is None:
            raise PickleError("it is truncated")
        self._stack.extend(value for _, value in struct.iter_unpack(">cd", run.group()))
        self._at = run.end()

    def _number(self) -> None:
        text = self._line()
        if len(text) > _LONGEST_NUMBER:
            raise PickleError("it has a number of thousands of digits")
        self._stack.append(text == b"01" if text in (b"00", b"01") else int(text))

    def _long(self) -> None:
        text = self._line().removesuffix(b"L")
        if len(text) > _LONGEST_NUMBER:
            raise PickleError("it has a number of thousands of digits")
        self._stack.append(int(text))

    def _float(self) -> None:
        self._stack.append(float(self._line()))

    def _quoted(self) -> None:
        text = self._line()
        if len(text) < 2 or text[:1] != text[-1:]:
            raise PickleError("it is damaged")
        self._stack.append(text[1:-1].decode("latin-1"))

    # What is built ---------------------------------------------------------------------------------------------------

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _push_since(self, make: Callable[[list[Any]], Any]) -> None:
        values = self._since_mark()
        self._stack.append(make(values))

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._outer.pop()

    def _tuple(self, n: int) -> None:
        if len(self._stack) < n:
            raise PickleError("it is damaged")
        values = tuple(self._stack[-n:])
        self._stack[-n:] = [values]

    def _put(self, index: int) -> None:
        value = self._stack[-1]
        self._memo[index] = value
        if type(value) is StandIn:
            value.memo.append(index)

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError("it is damaged")
        self._stack.append(Name(module, name))

    def _global(self) -> None:
        module, name = (self._line().decode("utf-8") for _ in range(2))
        self._name(module, name)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _make(self, maker: Any, args: Any) -> None:
        """What a call would make; `maker` may be anything in a hostile pickle."""
        if type(maker) is not Name or type(args) is not tuple:
            raise PickleError("it calls what is not a name")
        builder = self._builders.calls.get(maker.full)
        self._stack.append(StandIn(maker, args) if builder is None else builder(args))

    def _reduce(self) -> None:
        args, maker = self._stack.pop(), self._stack.pop()
        self._make(maker, args)

    def _new_with_keywords(self) -> None:
        _, args, maker = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._make(maker, args)

    def _instance(self) -> None:
        module, name = (self._line().decode("utf-8") for _ in range(2))
        self._make(Name(module, name), tuple(self._since_mark()))

    def _object(self) -> None:
        maker, *args = self._since_mark()
        self._make(maker, tuple(args))

    def _build(self) -> None:
        state, made = self._stack.pop(), self._stack[-1]
        if type(made) is not StandIn:
            return
        finish = self._builders.states.get(made.made_by.full)
        if finish is None:
            made.state = state
            return
        self._stack[-1] = value = finish(made, state)
        for index in made.memo:
            self._memo[index] = value

    def _persistent(self, key: Any) -> None:
        if self._builders.storage is None:
            raise PickleError("it names data that is stored elsewhere")
        self._stack.append(self._builders.storage(key))

    def _append(self, values: list[Any]) -> None:
        into = self._stack[-1]
        (into.elements if type(into) is StandIn else into).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        into = self._stack[-1]
        items = into.items if type(into) is StandIn else into
        if type(items) is not dict:
            raise PickleError("it is damaged")
        _fill(items, values)

    def _append_one(self) -> None:
        value = self._stack.pop()
        self._append([value])

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])


def _fill(items: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Adds keys and values in turn; a key that is not a plain value names no field, and is left out."""
    if len(values) % 2:
        raise PickleError("it is damaged")
    items.update((key, value) for key, value in zip(values[::2], values[1::2], strict=True) if type(key) in _KEYS)
    return items


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _pusher(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    """An opcode that pushes a value."""

    def push(machine: Machine) -> None:
        machine._stack.append(read(machine))

    return push


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _since(use: Callable[[Machine, list[Any]], None]) -> Callable[[Machine], None]:
    """An opcode that adds what was pushed since the last mark."""
    return lambda machine: use(machine, machine._since_mark())


# An opcode that holds a list or a dict pushes a new one each time.
_OPERATIONS: Mapping[int, Callable[[Machine], None]] = {
    ord(opcode): operation
    for opcode, operation in {
        "\x80": lambda m: m._take(1),
        "\x95": lambda m: m._take(8),
        "(": Machine._mark,
        "0": Machine._pop,
        "1": lambda m: m._since_mark(),
        "2": _pusher(lambda m: m._stack[-1]),
        "N": _pusher(lambda _: None),
        "\x88": _pusher(lambda _: True),
        "\x89": _pusher(lambda _: False),
        "I": Machine._number,
        "L": Machine._long,
        "F": Machine._float,
        "\x8a": _pusher(lambda m: _signed(m._sized(1))),
        "\x8b": _pusher(lambda m: _signed(m._sized(4))),
        "S": Machine._quoted,
        "T": _pusher(lambda m: m._sized(4).decode("latin-1")),
        "U": _pusher(lambda m: m._sized(1).decode("latin-1")),
        "V": _pusher(lambda m: m._line().decode("raw-unicode-escape")),
        "X": _pusher(lambda m: _text(m._sized(4))),
        "\x8c": _pusher(lambda m: _text(m._sized(1))),
        "\x8d": _pusher(lambda m: _text(m._sized(8))),
        "B": _pusher(lambda m: m._sized(4)),
        "C": _pusher(lambda m: m._sized(1)),
        "\x8e": _pusher(lambda m: m._sized(8)),
        "\x96": _pusher(lambda m: m._sized(8)),
        "]": _pusher(lambda _: []),
        "}": _pusher(lambda _: {}),
        ")": _pusher(lambda _: ()),
        "\x8f": _pusher(lambda _: []),
        "l": lambda m: m._push_since(list),
        "t": lambda m: m._push_since(tuple),
        "d": lambda m: m._push_since(lambda values: _fill({}, values)),
        "\x91": lambda m: m._push_since(list),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "a": Machine._append_one,
        "e": _since(Machine._append),
        "\x90": _since(Machine._append),
        "s": Machine._set_one,
        "u": _since(Machine._set_items),
        "p": lambda m: m._put(int(m._line())),
        "q": lambda m: m._put(m._size(1)),
        "r": lambda m: m._put(m._size(4)),
        "\x94": lambda m: m._put(len(m._memo)),
        "g": lambda m: m._get(int(m._line())),
        "h": lambda m: m._get(m._size(1)),
        "j": lambda m: m._get(m._size(4)),
        "c": Machine._global,
        "\x93": Machine._stack_global,
        "i": Machine._instance,
        "o": Machine._object,
        "\x81": Machine._reduce,
        "\x92": Machine._new_with_keywords,
        "R": Machine._reduce,
        "b": Machine._build,
        "P": lambda m: m._persistent(m._line().decode("latin-1")),
        "Q": lambda m: m._persistent(m._stack.pop()),
    }.items()
}
