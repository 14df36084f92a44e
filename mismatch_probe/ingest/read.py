"""From what the user names, a file or a folder, to the files of a dump and the format that they are in."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mismatch_probe.errors import DiskFull, IngestError
from mismatch_probe.ingest.base import TEXT_KEYS, Record, missing_key, quoted, quoted_list
from mismatch_probe.ingest.collect import Collector
from mismatch_probe.ingest.containers import LOADED_WHOLE, PICKLES, SUFFIXES, DumpFile, records
from mismatch_probe.ingest.formats import GENERIC, Format, formats
from mismatch_probe.ingest.keys import IDS, LENGTH, NAMED, RESPONSE, WHOLE
from mismatch_probe.ingest.recording import FILE
from mismatch_probe.ingest.suggest import Suggestion, suggested
from mismatch_probe.ingest.values import is_text
from mismatch_probe.results.dump import Recorded
from mismatch_probe.runs.folder import kind_of

AUTO = "auto"
_MOST_FILES = 100_000
_FIX = "Write a row per sequence into a .jsonl or .parquet file."
_MAP_FIX = "Write --map theirs=ours, e.g. --map my_logprobs=rollout_logprobs."


@dataclass(frozen=True)
class ReadOptions:
    """How a dump is read.

    Attributes:
        format: Name of its format, or `auto`.
        map: For the generic format: its keys, by the dump's own.
        trust_pickle: Whether pickles may be read; what they name is never run.
    """

    format: str = AUTO
    map: Mapping[str, str] = field(default_factory=dict)
    trust_pickle: bool = False


def read_dump(
    path: str | Path,
    out: Path,
    options: ReadOptions = ReadOptions(),
    log: Callable[[str], None] = lambda _: None,
    vocabulary: int | None = None,
) -> Recorded:
    """Reads a dump, a record at a time, and writes its rows as one Parquet file in the generic format.

    Log-probs keep their values in float64 and are never replaced: null is NaN, infinities stay.

    Args:
        path: A file, or a folder with many.
        out: The file to be written.
        options: How to read it.
        log: Told which files are loaded whole.
        vocabulary: How many ids the model has; rows with others are left out. None where it is not known.

    Raises:
        IngestError: Nothing there can be read, or a row is not what its format promises.
        DiskFull: No space is left for `out`.
    """
    name = str(path)
    path = Path(path).expanduser()
    found = _files(path, name)
    with _io_errors(name):
        if path.is_dir():
            found = _finished(found, name, log)
        # Said before formats are told apart, which loads them.
        for file in found:
            if file.container in LOADED_WHOLE and (options.trust_pickle or file.container not in PICKLES):
                log(f"{file.name} ({file.path.stat().st_size / (1 << 20):.0f} MiB) is loaded whole")
        chosen, files = _choose(found, name, options)
        if len(files) < len(found):
            log(f"{len(found) - len(files)} of {len(found)} files are empty or no {chosen.name}, and are not read")
        collector = Collector(out, vocabulary)
        try:
            for file in files:
                with _io_errors(file.name):
                    for record in _records(file, chosen, options.map):
                        collector.take(record, chosen)
            return collector.finish(name, chosen, (len(files), _digest(files)))
        except DiskFull as error:
            raise DiskFull(error.what, "Free some space and run the command again.") from error
        finally:
            collector.close()


def parse_map(texts: Iterable[str]) -> dict[str, str]:
    """Reads `--map theirs=ours`.

    Raises:
        IngestError: A part is malformed, or names no key of the generic format.
    """
    found: dict[str, str] = {}
    for text in texts:
        theirs, equals, ours = text.rpartition("=")
        if not equals or not theirs:
            raise IngestError(f"--map {quoted(text)} is not of the form theirs=ours.", _MAP_FIX)
        if ours not in NAMED:
            turned = f" Write {ours}={theirs}." if theirs in NAMED else ""
            known = ", ".join(sorted(NAMED))
            raise IngestError(f"--map names {quoted(ours)}, which is not a key of the generic format.", turned or known)
        if ours in found.values():
            raise IngestError(f"--map names {ours} twice.", "Keep one of the columns.")
        found[theirs] = ours
    return found


def _files(path: Path, name: str) -> list[DumpFile]:
    """The file, or those of the folder that a container may hold, in natural order."""
    try:
        # Asked before anything is opened: opening a pipe would wait for its writer.
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise IngestError(f"{name} does not exist.", "Check its path.") from None
    except (OSError, ValueError):  # ValueError: a NUL in its name
        mode = 0
    if stat.S_ISREG(mode):
        with _io_errors(name):
            container = _container(path)
        if container is None:
            raise IngestError(f"{name} is neither JSON, Parquet, SQLite nor a pickle.", _FIX)
        return [DumpFile(path, name, container)]
    if not stat.S_ISDIR(mode):
        raise IngestError(f"{name} is neither a file nor a folder, or is not accessible.", "Give a file or a folder.")
    with _io_errors(name):
        return _walked(path, name)


def _walked(path: Path, name: str) -> list[DumpFile]:
    def failed(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(path, onerror=failed):
        folders[:] = [one for one in folders if not one.startswith(".") and not _is_run(Path(folder) / one)]
        for one in names:
            file = Path(folder) / one
            suffix = _suffix(one)
            if suffix is not None and not one.startswith(".") and _is_own(file, path):
                shown = f"{name.rstrip('/')}/{_shown(str(file.relative_to(path)))}"
                found.append(DumpFile(file, shown, SUFFIXES[suffix]))
        if len(found) > _MOST_FILES:
            raise IngestError(f"{name} has more than {_MOST_FILES:,} files.", "Name a folder with fewer.")
    if not found:
        raise IngestError(f"{name} has no file of a kind that can be read.", _FIX)
    return sorted(found, key=lambda file: _natural(file.name))


def _is_run(folder: Path) -> bool:
    """Whether it was written here: the default `--out` can lie in the folder of a dump."""
    return kind_of(folder) is not None and (folder / FILE).exists()


def _is_own(file: Path, folder: Path) -> bool:
    """Whether it is a regular file that is not read by another name too."""
    regular = stat.S_ISREG(file.stat().st_mode)
    return regular and not (file.is_symlink() and file.resolve().is_relative_to(folder.resolve()))


def _shown(name: str) -> str:
    """A foreign name, safe to print and to encode."""
    return name if name.isprintable() else repr(name)[1:-1]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts step 2 before step 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() and len(part) < 19 else (-1, part) for part in parts]


def _suffix(name: str) -> str | None:
    return max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default=None)


def _container(path: Path) -> str | None:
    """By its suffix, or else by its first bytes; nothing is unpickled."""
    suffix = _suffix(path.name)
    if suffix is not None:
        return SUFFIXES[suffix]
    with path.open("rb") as handle:
        head = handle.read(512)
    for magic, container in ((b"PAR1", "parquet"), (b"SQLite format 3", "sqlite"), (b"PK\x03\x04", "torch")):
        if head.startswith(magic):
            return container
    if head[:1] == b"\x80":
        return "pickle"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return {b"{": "jsonl", b"[": "json"}.get(text[:1])


def _choose(files: list[DumpFile], name: str, options: ReadOptions) -> tuple[Format, list[DumpFile]]:
    """The format of a dump, and the files of it that are in this format."""
    known = formats()
    asked = GENERIC if options.map else options.format
    if asked not in (AUTO, *known):
        raise IngestError(f"There is no format {quoted(asked)}.", f"Known are {', '.join(known)}.")
    if options.map and options.format not in (AUTO, GENERIC):
        raise IngestError("--map is for the generic format.", "Leave --format or --map out.")
    pickles = [file for file in files if file.container in PICKLES]
    if pickles and not options.trust_pickle:
        files = [file for file in files if file.container not in PICKLES]
        if not files:
            raise _pickle_error(pickles)
    if asked != AUTO:
        chosen = known[asked]
        if chosen.refusal:
            raise _refused(name, chosen)
        fitting = [file for file in files if file.container in chosen.containers and not chosen.lies_beside(file.path)]
        if not fitting:
            containers = " or ".join(chosen.containers)
            raise IngestError(f"{name} has no file of the format {asked}, which is in {containers}.", _FIX)
        return chosen, fitting
    by_format, unknown = _sniffed(files, known)
    readable = {one: group for one, group in by_format.items() if not known[one].refusal}
    if len(readable) > 1:
        counts = ", ".join(f"{len(group)} of {one}" for one, group in readable.items())
        raise IngestError(f"{name} has files of several formats: {counts}.", "Name one with --format.")
    if readable:
        ((chosen_name, group),) = readable.items()
        return known[chosen_name], group
    if pickles and not options.trust_pickle:
        raise _pickle_error(pickles)
    if by_format:
        raise _refused(name, known[next(iter(by_format))])
    if unknown is None:
        raise IngestError(f"The file {name} has no rows." if len(files) == 1 else f"{name} has no rows.", _FIX)
    raise _unknown(unknown)


def _sniffed(files: list[DumpFile], known: Mapping[str, Format]) -> tuple[dict[str, list[DumpFile]], Record | None]:
    """Files by the format of their first record, and the first record that is of none."""
    found: dict[str, list[DumpFile]] = {}
    unknown = None
    for file in files:
        own = {one: format_ for one, format_ in known.items() if file.container in format_.containers}
        if any(format_.lies_beside(file.path) for format_ in own.values()):
            continue
        with _io_errors(file.name):
            opened = records(file)
            record = next(opened, None)
        if record is None:
            continue
        fits = {one: format_.fit(record.fields) for one, format_ in own.items()}
        best = max(fits, key=lambda one: fits[one], default="")
        if fits.get(best):
            # A single pickle is not loaded twice; of many, all would be in memory at once.
            if len(files) == 1 and file.container in PICKLES:
                file = replace(file, loaded=(record, *opened))
            found.setdefault(best, []).append(file)
        else:
            unknown = unknown or record
    return found, unknown


def _finished(files: list[DumpFile], name: str, log: Callable[[str], None]) -> list[DumpFile]:
    """The files of a folder without those that a framework has not marked as complete."""
    marked = [format_ for format_ in formats().values() if format_.marker[0]]
    left_out = [(file, one) for file in files for one in marked if one.unfinished(file.path)]
    if not left_out:
        return files
    first, of = left_out[0]
    what = f"{of.project} writes {of.marker[1]} beside complete files, and {{}} without it, the first is {first.name}"
    without = {file for file, _ in left_out}
    kept = [file for file in files if file not in without]
    if not kept:
        fix = "Wait until the step is written, or name one file to read it as it is."
        raise IngestError(f"{name} has no complete file: {what.format(f'{len(left_out)} are')}.", fix)
    log(f"{len(left_out)} files are left out: {what.format('they are')}")
    return kept


def _records(file: DumpFile, chosen: Format, renamed: Mapping[str, str]) -> Iterator[Record]:
    for record in (chosen.records or records)(file):
        yield _renamed(record, renamed) if renamed else record


def _renamed(record: Record, renamed: Mapping[str, str]) -> Record:
    """A record by the keys that `--map` says; a key of ours that it names otherwise gives way."""
    values = {}
    for theirs, ours in renamed.items():
        try:
            values[ours] = _reached(record.fields, theirs)
        except KeyError:
            record.refuse(
                f"has no {quoted(theirs)[1:-1]}, which --map names; its keys are {quoted_list(record.fields)}", _MAP_FIX
            )
    used = {*renamed, *(theirs.partition(".")[0] for theirs in renamed if theirs not in record.fields)}
    return replace(record, fields={key: one for key, one in record.fields.items() if key not in used} | values)


def _reached(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a key, or, as `outer.inner`, of one of an object in it.

    Raises:
        KeyError: There is none.
    """
    outer, dot, inner = name.partition(".")
    if name in fields or not dot or not isinstance(fields.get(outer), Mapping):
        return fields[name]
    return _reached(fields[outer], inner)


def _unknown(record: Record) -> IngestError:
    """What an unknown record holds, and the `--map` that probably reads it, or why none does."""
    guess = suggested(record.fields)
    if not guess.map and any(is_text(record.fields.get(name), str, dict) for name in TEXT_KEYS):
        what, fix = missing_key(RESPONSE, record.fields, text=True)
        return IngestError(record.place.said(record.row, what), fix)
    what = record.place.said(record.row, f"is of no known format; its keys are {quoted_list(record.fields)}")
    more = [*_missing(guess, record.fields), *guess.unreadable]
    if not guess.map:
        return IngestError(what, "; ".join([f"Write {' and '.join(IDS)}, or name them with --map", *more]) + ".")
    said = ",".join(f"{theirs}={ours}" for theirs, ours in guess.map.items())
    unsure = [f"{name} is trainer_logprobs if the trainer made it" for name in guess.unsure]
    return IngestError(what, "; ".join([f"Name its columns, probably --map {said}", *unsure, *more]) + ".")


def _missing(guess: Suggestion, fields: Mapping[str, Any]) -> list[str]:
    """What the suggested `--map` leaves without a value that has to be there."""
    there = {*guess.map.values(), *fields}
    if not guess.map:
        return []
    if RESPONSE not in there and WHOLE in there:
        begins = "" if {LENGTH, "loss_mask"} & there else f"nothing says where the response begins: write {LENGTH}"
        return [begins] if begins else []
    return [f"nothing looks like {key}" for key in IDS if key not in there]


def _refused(name: str, chosen: Format) -> IngestError:
    """Why nothing can be read from a dump of a format, and what to switch on in its framework."""
    return IngestError(f"{name} is a dump of {chosen.written_for}: {chosen.refusal}.", chosen.switch)


def _pickle_error(files: list[DumpFile]) -> IngestError:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return IngestError(
        f"The file {files[0].name}{more} may contain a pickle, which can run code when opened.",
        f"If you trust whoever wrote it, add --trust-pickle. {_FIX}",
    )


def _digest(files: list[DumpFile]) -> str:
    """SHA-256 of a file's bytes; of several, of their digests in order."""
    digests = []
    for file in files:
        with file.path.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def _io_errors(name: str) -> Iterator[None]:
    """An I/O failure of the dump as one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise IngestError(f"{name} is a damaged gzip file ({quoted(str(error))}).", "Write it again.") from None
    except OSError as error:
        where = _shown(error.filename) if isinstance(error.filename, str) else name
        raise IngestError(f"{where} cannot be read: {error.strerror or error}.", "Make it readable.") from None
