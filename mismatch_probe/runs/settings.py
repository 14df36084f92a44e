"""Settings of earlier runs: a file of settings, or the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mismatch_probe.config.settings import Settings, settings_of
from mismatch_probe.config.toml import read_settings
from mismatch_probe.errors import UsageError
from mismatch_probe.results.manifest import Manifest
from mismatch_probe.results.rl_run import RlRun
from mismatch_probe.results.sanity import SanitySet

_DOCUMENTS: Mapping[str, type[Manifest] | type[RlRun] | type[SanitySet]] = {
    "manifest.json": Manifest,
    "run.json": RlRun,
    "sanity.json": SanitySet,
}


def values_from(path: str | Path | None, kind: type[Settings]) -> dict[str, Any]:
    """Settings by name.

    Args:
        path: A TOML file, the folder of a run, or None for none.
        kind: Whose settings are known; a folder's others are left out, and so is what only the command line can set.

    Raises:
        TableError: The document of the folder is damaged.
        UsageError: The path is neither, or a key of the file is unknown.
    """
    if path is None:
        return {}
    folder = Path(path)
    if not folder.is_dir():
        return read_settings(path, kind)
    for name, document in _DOCUMENTS.items():
        if (folder / name).exists():
            config = document.read(folder / name).content()["config"]
            known = settings_of(kind)
            return {key: value for key, value in config.items() if key in known and known[key].file}
    raise UsageError(f"{path} is not a run folder.", "Give a TOML file, or the folder of a run.")
