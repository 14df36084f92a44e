"""TensorBoard event files: TFRecords of protocol buffers, read without TensorFlow.

A record is its length (8 bytes, little-endian) with a masked CRC-32C, then the data with theirs. Of an `Event` the step
(field 2) and the summary (5) are read, of each value of that the tag (1) and the scalar: `simple_value` (2), or the
first number of a float or double `tensor` (8) of one element.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO

from mismatch_probe.ingest.metric_log import LONGEST_NAME, Reading, Record, metric_reader

_CHECKED = 1 << 12  # bytes; larger records hold images and histograms, whose sums would take minutes
_LONGEST = 1 << 28
_MASK_DELTA = 0xA282EAD8
_FLOAT, _DOUBLE = 1, 2  # of DataType


@cache
def _table() -> tuple[int, ...]:
    """The CRC-32C (Castagnoli, reflected) of every byte."""
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data`, masked as TFRecords store it."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _sniff(head: bytes, suffix: str) -> bool:
    return len(head) >= 12 and struct.unpack_from("<I", head, 8)[0] == masked_crc(head[:8])


@metric_reader("tensorboard", _sniff)
def read(handle: BinaryIO, reading: Reading) -> Iterator[Record]:
    """The scalars. A record with a wrong sum is left out; after a wrong length, nothing more is found."""
    while header := handle.read(12):
        if len(header) < 12:
            reading.damage["tail-cut"] += 1
            return
        length, crc = struct.unpack("<QI", header)
        if crc != masked_crc(header[:8]) or length > _LONGEST:
            reading.damage["record-damaged"] += 1
            return
        data, end = handle.read(length), handle.read(4)
        if len(data) < length or len(end) < 4:
            reading.damage["tail-cut"] += 1
            return
        if length <= _CHECKED and struct.unpack("<I", end)[0] != masked_crc(data):
            reading.damage["record-damaged"] += 1
            continue
        try:
            found = _event(data)
        except (ValueError, IndexError, struct.error):
            reading.damage["record-damaged"] += 1
            continue
        if found.values:
            yield found


def _event(data: bytes) -> Record:
    step, values = 0, dict[str, float | None]()
    for field, value in _fields(data):
        if field == 2 and isinstance(value, int):
            step = value - (1 << 64) if value >> 63 else value
        elif field == 5 and isinstance(value, bytes):
            values.update(scalar for one in _messages(value, 1) if (scalar := _scalar(one)) is not None)
    return Record(values, float(step))


def _messages(data: bytes, wanted: int) -> Iterator[bytes]:
    return (value for field, value in _fields(data) if field == wanted and isinstance(value, bytes))


def _scalar(data: bytes) -> tuple[str, float] | None:
    tag, found = "", None
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            tag = value[:LONGEST_NAME].decode("utf-8", errors="replace")
        elif field == 2 and isinstance(value, float):
            found = value
        elif field == 8 and isinstance(value, bytes):
            found = _tensor(value)
    return None if found is None else (tag, found)


def _tensor(data: bytes) -> float | None:
    """The number of a float or double tensor of one element."""
    parts = dict(_fields(data))
    format_, field = {_FLOAT: ("<f", 5), _DOUBLE: ("<d", 6)}.get(int(_whole(parts.get(1))), ("", 0))
    if not format_:
        return None
    found = parts.get(4) or parts.get(field)
    if isinstance(found, float):
        return found
    if isinstance(found, bytes) and len(found) == struct.calcsize(format_):
        return float(struct.unpack(format_, found)[0])
    return None


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a message: number, and an integer, a float, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
            case 1:
                yield key >> 3, float(struct.unpack_from("<d", data, at)[0])
                at += 8
            case 2:
                length, at = _varint(data, at)
                if length > len(data) - at:
                    raise ValueError("a field is longer than its message")
                yield key >> 3, data[at : at + length]
                at += length
            case 5:
                yield key >> 3, float(struct.unpack_from("<f", data, at)[0])
                at += 4
            case kind:
                raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than 10 bytes")
