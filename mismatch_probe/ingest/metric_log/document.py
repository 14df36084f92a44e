"""A JSON document over several lines: a trainer's state, a list of steps, an export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.metric_log import Reading, Record, is_text, metric_reader
from mismatch_probe.ingest.metric_log.objects import records_of
from mismatch_probe.ingest.metric_log.text import record_of

_MOST = 64 << 20
_LINES = 5


def _sniff(head: bytes, suffix: str) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    # A dict as Python prints it begins with a quote, `[rank0]` and the like with a letter or a digit.
    begins = start[:1] == b"{" and start[1:].lstrip()[:1] in (b'"', b"}", b"")
    begins |= start[:1] == b"[" and start[1:].lstrip()[:1] in (b"{", b"[", b"]")
    return is_text(head) and begins and not any(_is_object(line) for line in start.split(b"\n")[:_LINES])


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object, so that the file is a log of them."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@metric_reader("json", _sniff)
def read(handle: BinaryIO, reading: Reading) -> Iterator[Record]:
    """The records of the document; of one that is cut, what its lines say."""
    content = handle.read(_MOST + 1)
    if len(content) > _MOST:
        what = f"{reading.name} is a JSON document of more than {_MOST >> 20} MiB, which would have to be held whole."
        raise IngestError(what, "Write one JSON object per line: jq -c '.[]' FILE.")
    text = content.decode("utf-8-sig", errors="replace")
    try:
        yield from records_of(json.loads(text), reading)
    except (ValueError, RecursionError):
        reading.damage["json-cut"] += 1
        found = (record_of(line, reading) for line in text.splitlines())
        yield from (one for one in found if one is not None)
