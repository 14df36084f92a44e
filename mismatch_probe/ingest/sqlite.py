"""SQLite databases, read only: a record that names the tables, and rows of a table one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mismatch_probe.ingest.base import Place, Record, quoted
from mismatch_probe.ingest.containers import DumpFile

_LONGEST_VALUE = 1 << 28


def sqlite_tables(file: DumpFile) -> Iterator[Record]:
    """One record: by table, its columns. Formats read the rows themselves.

    Raises:
        IngestError: The file is not a database, or is corrupt.
    """
    place = Place(file.name, "Sequence")
    with opened(file, place) as database:
        yield Record(tables(database), place, 1)


def tables(database: sqlite3.Connection) -> dict[str, list[str]]:
    """Columns by table; views and virtual tables, whose rows are made by what the file says, are left out."""
    found = database.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'table'").fetchall()
    plain = [name for name, sql in found if isinstance(sql, str) and sql.upper().split()[:2] == ["CREATE", "TABLE"]]
    named = "SELECT name FROM pragma_table_info(?)"
    return {name: [str(column) for (column,) in database.execute(named, (name,))] for name in plain}


@contextmanager
def opened(file: DumpFile, place: Place) -> Iterator[sqlite3.Connection]:
    """A database that is not written to, nor are files made beside it.

    A write-ahead log beside it belongs to it and is read; without one the file is taken as immutable, because a reader
    of a database in that mode would make one.

    Raises:
        IngestError: It is not a database, or is corrupt.
    """
    path = file.path.resolve()
    log = Path(f"{path}-wal")
    mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True)) as database:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
            database.execute("PRAGMA trusted_schema = OFF")
            yield database
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        place.refuse_file(
            f"is corrupt, locked or not a SQLite database ({quoted(str(error))})", "Copy or write it again."
        )


def rows(database: sqlite3.Connection, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of a query, one at a time."""
    yield from database.execute(query, values)
