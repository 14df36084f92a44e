"""Files that ship with the package, found alike in a wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_path(name: str) -> Path:
    """The path of a shipped data file, e.g. `data_path("prompts.jsonl")`.

    A wheel holds the data in `mismatch_probe/data/`; a checkout (and so an editable install) holds it in `data/` beside
    the package.

    Raises:
        FileNotFoundError: No such file is shipped, which is a fault of the package and never of its user.
    """
    candidates = (_PACKAGE / "data" / name, _PACKAGE.parent / "data" / name)
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is neither at {candidates[0]} nor at {candidates[1]}")
