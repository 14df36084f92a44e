"""TensorBoard event files, written by hand after the protocol buffers `Event`, `Summary` and `TensorProto`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mismatch_probe.ingest.metric_log.events import masked_crc

Made = float | bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def record(data: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def event(step: int, values: Mapping[str, Made]) -> bytes:
    """An `Event`; a value of bytes is what follows the tag, other than `simple_value`."""
    simple = (
        _bytes(1, _bytes(1, tag.encode()) + (v if isinstance(v, bytes) else _varint(2 << 3 | 5) + struct.pack("<f", v)))
        for tag, v in values.items()
    )
    return _varint(1 << 3 | 1) + struct.pack("<d", 1.0) + _varint(2 << 3) + _varint(step) + _bytes(5, b"".join(simple))


def event_file(points: Iterable[tuple[int, Mapping[str, Made]]]) -> bytes:
    """A file with its first event, of the version, and one for each step."""
    version = _varint(1 << 3 | 1) + struct.pack("<d", 1.0) + _bytes(3, b"brain.Event:2")
    return record(version) + b"".join(record(event(step, values)) for step, values in points)


@dataclass(frozen=True)
class tensor:  # noqa: N801
    """Makes a tensor of one element: float or double, its content packed or as raw bytes."""

    kind: str
    raw: bool

    def __call__(self, value: float) -> bytes:
        """The `tensor` field of a summary's value."""
        packed = struct.pack(f"<{self.kind}", value)
        dtype = _varint(1 << 3) + _varint(2 if self.kind == "d" else 1)
        field = 4 if self.raw else (6 if self.kind == "d" else 5)
        return _bytes(8, dtype + _bytes(field, packed))


def histogram() -> bytes:
    """The `histo` field of a summary's value."""
    return _bytes(5, _varint(1 << 3 | 1) + struct.pack("<d", 0.5))
