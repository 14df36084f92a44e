"""Arrays of what numpy and torch write into pickles, by numpy alone.

Shapes, strides and offsets come from the file, so each is checked against the bytes that are there: a tensor never
reaches outside its storage, and one that claims many more elements than were stored is refused. Types that numpy does
not have are widened exactly: bfloat16 becomes float32; float8 is left as bytes.

Sources of the layouts: `numpy.ndarray.__reduce__`, `torch/_utils.py`, `torch/serialization.py` (torch 2.13),
`tensordict/_reductions.py` (0.15).
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.ingest.pickles.machine import Builders, Machine, Name, PickleError, StandIn

Array = NDArray[Any]
# Types of numpy that are plain numbers or text; `O` is a list of values.
_PLAIN = re.compile(r"[<>|=]?(?:[biufSU]\d{1,9}|[bB?hHiIlLqQefd]|bool|u?int(?:8|16|32|64)|float(?:16|32|64))")
_STORED = {
    "Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "bf16", "Long": "i8", "Int": "i4",
    "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip
_TYPES = {
    "float32": "f4", "float": "f4", "float64": "f8", "double": "f8", "float16": "f2", "half": "f2",
    "bfloat16": "bf16", "int64": "i8", "long": "i8", "int32": "i4", "int": "i4", "int16": "i2",
    "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?",
}  # fmt: skip
# A view that repeats its storage, as `expand` makes, may have this many elements.
_LARGEST_VIEW = 1 << 26
_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP = b"PK\x03\x04"
# What a file that is not what it seems can make of the code below.
_HOSTILE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """The bytes of a torch storage, and the type that its class says; None where the tensor says it."""

    data: bytes
    kind: str | None
    order: str = "<"


def decoded(data: bytes, kind: str, order: str = "<") -> Array:
    """The values of bytes, 1-D; bfloat16 becomes float32."""
    if kind == "bf16":
        return (np.frombuffer(data, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.dtype(kind) if kind == "?" else np.dtype(order + kind))


def kind_of(torch_type: Any) -> str:
    """The type that a torch dtype names, as numpy writes it."""
    text = torch_type.name if type(torch_type) is Name else str(torch_type)
    return _TYPES.get(text.removeprefix("torch."), "u1")


def _count(shape: Sequence[Any]) -> int:
    if not all(type(n) is int and n >= 0 for n in shape):
        raise PickleError("it has an array of an impossible shape")
    return math.prod(shape)


# numpy ---------------------------------------------------------------------------------------------------------------


def _numpy_type(made: Any) -> np.dtype[Any]:
    """The type that `numpy.dtype(text, …)` and its state, `(version, byte order, sub-array, names, fields, …)`, say."""
    text = made.args[0] if type(made) is StandIn and made.made_by.full == "numpy.dtype" else None
    if text in ("O", "O8"):
        return np.dtype(object)
    _, order, *parts = made.state if made is not None and made.state else (0, "=", None)
    if type(text) is not str or _PLAIN.fullmatch(text) is None or any(part is not None for part in parts[:3]):
        raise PickleError("it has an array of a type that is not read")
    plain = np.dtype(text)
    return plain.newbyteorder(">") if order == ">" else plain


def _ndarray(made: StandIn, state: Any) -> Any:
    _, shape, dtype, is_fortran, data = state
    return _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    """An array; of objects, the list of them."""
    kind = _numpy_type(dtype)
    if kind.hasobject:
        return list(data)
    if type(data) is str:
        data = data.encode("latin-1")
    if _count(shape) * kind.itemsize != len(data):
        raise PickleError("it has an array of another size than its data")
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


def _scalar(args: tuple[Any, ...]) -> Any:
    dtype, data = args
    if _numpy_type(dtype).hasobject:
        return data
    return _array(data, dtype, (1,))[0].item()


def _encoded(args: tuple[Any, ...]) -> Any:
    text, encoding = args
    if encoding != "latin1":
        raise PickleError("it has text in an encoding that is not read")
    return text.encode("latin-1")


def _bytes(args: tuple[Any, ...]) -> bytes:
    return args[0] if args and type(args[0]) is bytes else b""


def _first(args: tuple[Any, ...]) -> Any:
    return args[0]


def _listed(args: tuple[Any, ...]) -> Any:
    return list(args[0]) if args else []


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args else ()
    return {key: value for key, value in pairs if isinstance(key, str | int)}


def _numpy_calls() -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    calls: dict[str, Callable[[tuple[Any, ...]], Any]] = {
        "_codecs.encode": _encoded,
        "collections.OrderedDict": _ordered,
        "collections.defaultdict": lambda _: {},
        "collections.deque": _listed,
        "torch.Size": lambda args: tuple(args[0]),
    }
    for core in ("numpy.core", "numpy._core"):
        calls[f"{core}.multiarray.scalar"] = _scalar
        calls[f"{core}.numeric._frombuffer"] = lambda args: _array(*args[:4])
    for module in ("builtins", "__builtin__"):
        calls |= {f"{module}.{name}": _listed for name in ("set", "frozenset", "list")}
        calls |= {f"{module}.{name}": _bytes for name in ("bytes", "bytearray")}
    return calls


_STATES: dict[str, Callable[[StandIn, Any], Any]] = {
    f"{core}.multiarray._reconstruct": _ndarray for core in ("numpy.core", "numpy._core")
}


# torch ---------------------------------------------------------------------------------------------------------------


def _tensor(args: tuple[Any, ...]) -> Any:
    """A view of a storage, by `_rebuild_tensor_v2` and its successors."""
    storage, offset, shape, strides = args[:4]
    kind = kind_of(args[6]) if len(args) > 6 and type(args[6]) is Name else None
    if type(storage) is not Storage:
        raise PickleError("it has a tensor without its data")
    kind = kind or storage.kind
    if kind is None:
        raise PickleError("it has a tensor of no type")
    size = 2 if kind == "bf16" else np.dtype(kind).itemsize
    n, _, stored = _count(shape), _count(strides), len(storage.data) // size
    if len(strides) != len(shape) or type(offset) is not int or offset < 0:
        raise PickleError("it has a tensor of an impossible shape")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if n and last >= stored:
        raise PickleError("it has a tensor that is larger than its data")
    if n > max(stored, _LARGEST_VIEW):
        raise PickleError(f"it has a tensor of {n} elements of which {stored} are stored")
    if not n:
        return np.zeros(shape, np.float32 if kind == "bf16" else kind)
    values = decoded(storage.data[: stored * size], kind, storage.order)
    steps = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)


def _of_type(args: tuple[Any, ...]) -> Any:
    """What `_rebuild_from_type_v2` makes: a call, then a class and a state around it."""
    function, _, inner, _ = args
    build = _TORCH.get(function.full) if type(function) is Name else None
    if build is None or type(inner) is not tuple:
        raise PickleError("it has a tensor of a class that is not read")
    return build(inner)


def _jagged(args: tuple[Any, ...]) -> Any:
    state = args[0]
    return ragged(state["values"], state["offsets"], state.get("lengths"))


def ragged(values: Array, offsets: Array, lengths: Array | None = None) -> list[Array]:
    """The parts of a nested tensor; `offsets` is `[B+1]`, `lengths` `[B]` where parts have gaps between them."""
    bounds = offsets.tolist()
    ends = bounds[1:] if lengths is None else [start + n for start, n in zip(bounds, lengths.tolist(), strict=False)]
    return [values[start:end] for start, end in zip(bounds, ends, strict=False)]


def _nested(args: tuple[Any, ...]) -> Any:
    """A nested tensor of the strided layout; its parts are contiguous."""
    buffer, shapes, _, starts = args
    parts = []
    for shape, start in zip(shapes.tolist(), starts.tolist(), strict=True):
        parts.append(buffer[start : start + _count(shape)].reshape(shape))
    return parts


def _consolidated(args: tuple[Any, ...]) -> dict[str, Any]:
    """The tensors of a consolidated tensordict, which are slices of one storage."""
    metadata, storage = args
    return _leaves(metadata, storage.tobytes())


def _leaves(metadata: Mapping[str, Any], data: bytes, depth: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {key: held[0] for key, held in metadata["non_tensors"].items()}
    parts: dict[str, Any] = {}
    for key, (kind_name, shape, start, stop, *_) in metadata["leaves"].items():
        kind, n = kind_of(kind_name), _count(shape)
        size = 2 if kind == "bf16" else np.dtype(kind).itemsize
        if not 0 <= start <= start + n * size <= stop <= len(data):
            raise PickleError("it has a tensor that is larger than its data")
        value = decoded(data[start : start + n * size], kind).reshape(shape)
        mark, _, name = key.rpartition(">")
        if not mark:
            found[key] = value
            continue
        parts[mark] = value
        if mark == "<NJT_OFFSETS":
            found[name] = ragged(parts.pop("<NJT_VALUES"), parts.pop(mark), parts.pop("<NJT_LENGTHS", None))
    own = ("non_tensors", "leaves", "cls", "cls_metadata", "size")
    inner = {key: value for key, value in metadata.items() if key not in own and type(value) is dict}
    return found | {key: _leaves(value, data, depth + 1) for key, value in inner.items() if depth < 8}


def _tensordict(args: tuple[Any, ...]) -> Any:
    return args[1]["_tensordict"]


_TORCH: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": lambda args: _tensor(args[:6]),
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nested._internal.nested_tensor._rebuild_njt": lambda args: _jagged(args),
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch.storage._load_from_bytes": lambda args: load_bytes(args[0]),
    "tensordict._reductions._rebuild_tensordict_files_consolidated": _consolidated,
    "tensordict._reductions._make_td": _tensordict,
}
_CALLS = _numpy_calls() | _TORCH


# Files ---------------------------------------------------------------------------------------------------------------


def load_file(path: Path) -> Any:
    """The value of a pickle, or of a torch file of either layout.

    Raises:
        PickleError: It is truncated, damaged, or claims more than it has.
        OSError: The file cannot be read.
    """
    with path.open("rb") as handle:
        data = handle.read(4)
        if data != _ZIP:
            data += handle.read()
        with reading():
            return _load_zip(handle) if data == _ZIP else load_bytes(data)


@contextmanager
def reading() -> Iterator[None]:
    """What a file that is not what it seems makes of the code that reads it, as one kind of error."""
    try:
        yield
    except PickleError:
        raise
    except _HOSTILE as error:
        raise PickleError(f"it is truncated or damaged ({type(error).__name__})") from None


def load_bytes(data: Any) -> Any:
    """The value of a pickle or of a torch file in memory; errors as of `Machine.load`, and those of a zip."""
    if type(data) is not bytes:
        raise PickleError("it is damaged")
    if data.startswith(_ZIP):
        return _load_zip(io.BytesIO(data))
    machine = Machine(data, Builders(_CALLS, _STATES))
    value = machine.load()
    return _load_legacy(data, machine.position) if type(value) is int and value == _MAGIC else value


def _load_zip(handle: IO[bytes]) -> Any:
    """A torch file since 1.6: a zip of one pickle and of storages, none of them compressed."""
    size = handle.seek(0, io.SEEK_END)
    with zipfile.ZipFile(handle) as archive:
        members = {one.filename.partition("/")[2]: one for one in archive.infolist()}
        if any(one.compress_type != zipfile.ZIP_STORED for one in members.values()):
            raise PickleError("it is a zip with compressed members, which torch does not write")
        if sum(one.file_size for one in members.values()) > size:
            raise PickleError("it is a zip that claims more bytes than it has")
        if "data.pkl" not in members:
            raise PickleError("it is a zip without the pickle of a torch file")
        order = ">" if "byteorder" in members and archive.read(members["byteorder"]) == b"big" else "<"
        read: dict[str, bytes] = {}

        def storage(key: Any) -> Storage:
            _, kind, name, *_ = key
            if name not in read:
                read[name] = archive.read(members[f"data/{name}"])
            return Storage(read[name], _storage_kind(kind), order)

        return Machine(archive.read(members["data.pkl"]), Builders(_CALLS, _STATES, storage)).load()


def _storage_kind(kind: Any) -> str | None:
    name = kind.name if type(kind) is Name else ""
    return _STORED.get(name.removesuffix("Storage"))


def _load_legacy(data: bytes, at: int) -> Any:
    """A torch file before 1.6, which `pickle.dump` of a tensor still embeds: pickles, then storages.

    The pickle of the object is read twice: once for the names of its storages, once with their bytes.
    """
    named: dict[str, str | None] = {}

    def note(key: Any) -> Storage:
        _, kind, name, *_ = key
        named[name] = _storage_kind(kind)
        return Storage(b"", "u1")

    machine = Machine(data, Builders({}, {}, note), at)
    for _ in range(2):
        machine.load()
    start = machine.position
    machine.load()
    keys = machine.load()
    at, found = machine.position, {}
    for key in keys:
        kind = named.get(key)
        size = 2 if kind == "bf16" else np.dtype(kind or "u1").itemsize
        n = int.from_bytes(data[at : at + 8], "little", signed=True)
        if n < 0 or at + 8 + n * size > len(data):
            raise PickleError("it is truncated")
        found[key] = Storage(data[at + 8 : at + 8 + n * size], kind)
        at += 8 + n * size
    return Machine(data, Builders(_CALLS, _STATES, lambda key: found[key[2]]), start).load()
