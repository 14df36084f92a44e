"""Runs recorded elsewhere, read into one columnar form; nothing is measured here and nothing is re-tokenised.

A module of this package that registers a reader is found by itself; the suffix of a file says which one reads it. JSON
Lines and Parquet hold the generic format, which any program can write, a row per sequence:

    prompt_token_ids    list of int      the ids that the model saw
    response_token_ids  list of int      the ids that were sampled, end-of-sequence included
    rollout_logprobs    list of float    b_t, one per response token, of the distribution that sampled them
    trainer_logprobs    list of float    a_t likewise; at least one of the two sides
    loss_mask           list of 0 and 1  optional: the response tokens that count
    step                int              optional: the training step
    prompt_id           text             optional: what makes one cluster of an interval; else equal prompts do
    finish_reason       text             optional

Other columns are ignored, and named in the run's facts.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mismatch_probe.errors import IngestError
from mismatch_probe.ingest.base import RecordedRun
from mismatch_probe.registered import Registry

# Given the file, opened in binary at its start, and the path as the user gave it. Raises IngestError where a row is not
# what the format promises, and OSError where the file cannot be read to its end.
Reader = Callable[[IO[bytes], str], RecordedRun]
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".npz", ".npy", ".bin")
_FIX = "Write a row per sequence into a .jsonl or .parquet file."
_REGISTRY = Registry[Reader](__name__, "reader of")


def reader(suffix: str) -> Callable[[Reader], Reader]:
    """Registers what reads files of a suffix, in lower case with its dot.

    Raises:
        ValueError: The suffix is taken, or that of pickles.
    """

    def register(read: Reader) -> Reader:
        if suffix in _PICKLES:
            raise ValueError(f"files with the suffix {suffix} are never read")
        _REGISTRY.add(suffix, read)
        return read

    return register


def readers() -> dict[str, Reader]:
    """Every registered reader by suffix."""
    return _REGISTRY.sorted()


def read_recorded(path: str | Path) -> RecordedRun:
    """Reads a recorded run; the format follows the suffix, and no file is opened to find out what it is.

    Memory is that of the columns (4 bytes per id, 8 per log-prob or 4 where Parquet has float32, 1 per mask), and up to
    a quarter more while they grow. Log-probs keep their precision and are never replaced: null is NaN, infinities stay.

    Raises:
        IngestError: The file cannot be read, is of another kind, or one of its rows breaks the format.
    """
    name = str(path)
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix in _PICKLES:
        raise IngestError(f"The file {name} may contain a pickle, which can run code when opened.", _FIX)
    known = readers()
    if suffix not in known:
        raise IngestError(f"The file {name} has the suffix {suffix!r}; supported are {' and '.join(known)}.", _FIX)
    try:
        # Asked before it is opened: opening a pipe would wait for its writer.
        is_regular = stat.S_ISREG(file.stat().st_mode)
    except FileNotFoundError:
        raise IngestError(f"The file {name} does not exist.", "Check its path.") from None
    except (OSError, ValueError):  # ValueError: a NUL in its name
        is_regular = False
    if not is_regular:
        raise IngestError(f"{name} is not a regular file, or its folder is not accessible.", "Give a regular file.")
    try:
        with file.open("rb") as handle:
            return known[suffix](handle, name)
    except OSError as error:
        raise IngestError(
            f"The file {name} cannot be read: {error.strerror or error}.", "Check its permissions."
        ) from None
