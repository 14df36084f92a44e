"""Arrays with a few facts beside them in one file, which is never half-written and says what it was made of."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.files import atomic_path

# What zipfile, zlib and numpy raise at bytes that are not theirs.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    SyntaxError,
    NotImplementedError,
    TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def save_arrays(path: Path, key: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a file, atomically.

    Args:
        path: The file, `.npz`.
        key: A digest of all that the content depends on.
        facts: What JSON can hold.
        arrays: By name.

    Raises:
        DiskFull: No space is left on the device.
        TableError: Another I/O failure.
    """
    about = json.dumps({"key": key, "facts": dict(facts)})
    with atomic_path(path) as partial, partial.open("wb") as handle:
        np.savez_compressed(handle, about=np.array(about), **dict(arrays))  # type: ignore[arg-type]


def load_arrays(path: Path, key: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """Reads facts and arrays; None where there is no file, it is damaged, or it was made of something else."""
    try:
        # Opened here: of a damaged file numpy would leave its own handle open.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            if about["key"] != key:
                return None
            return about["facts"], {name: found[name] for name in found.files if name != "about"}
    except _DAMAGE:
        return None
