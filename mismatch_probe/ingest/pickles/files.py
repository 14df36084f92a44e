"""Pickles and torch files as records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mismatch_probe.ingest.base import Place, Record, kind
from mismatch_probe.ingest.containers import DumpFile
from mismatch_probe.ingest.pickles.classes import fields_of
from mismatch_probe.ingest.pickles.machine import PickleError
from mismatch_probe.ingest.pickles.rebuild import load_file, reading


def pickled(file: DumpFile) -> Iterator[Record]:
    """A record of the one object in the file, or of each in its list; loaded whole.

    Raises:
        IngestError: The file is damaged, or holds something else.
        OSError: It cannot be read.
    """
    place = Place(file.name, "Sample")
    try:
        values = _values(load_file(file.path))
        with reading():
            found = [fields_of(value) for value in values]
    except PickleError as error:
        place.refuse_file(f"cannot be read: {error}", "Write it again, with torch.save or pickle.dump.")
    for number, fields in enumerate(found, start=1):
        if fields is None:
            what = f"is {kind(values[number - 1])}, which has no keys"
            place.refuse(number, what, "Write a dict of tensors or lists, or a list of them.")
        yield Record(fields, place, number)


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
