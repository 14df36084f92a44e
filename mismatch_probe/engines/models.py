"""From a name to a checkpoint folder: a built-in model, a local folder, or a hub id. Imports no engine."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.engines.builtin import BUILTINS, builtin_path, pull, sha256
from mismatch_probe.errors import EngineMissing, ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelRef:
    """A checkpoint: on this disk or, where only a plan is wanted, known by its configuration.

    Attributes:
        name: What the user called it.
        path: Its folder.
        revision: Commit of a hub snapshot.
        config: Its `config.json`.
        known_parameters: Number of weights, where the weights are not on this disk.
    """

    name: str
    path: Path
    revision: str | None
    config: dict[str, Any]
    known_parameters: int | None = None

    @classmethod
    def none(cls) -> ModelRef:
        """No checkpoint, for a run that needs no engine."""
        return cls("", Path(), None, {})

    @property
    def scripted(self) -> bool:
        return self.config.get("model_type") == "scripted"

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration."""
        return text_config(self.config)

    @property
    def context(self) -> int | None:
        """Longest sequence the model was made for, in tokens."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(self.text_config.get(key), int):
                return int(self.text_config[key])
        return None

    def parameters(self) -> int:
        """Number of weights; where they are on this disk, from the headers of the safetensors files.

        Raises:
            ModelError: There is no safetensors file, or one is none, as when Git LFS left a pointer in its place.
        """
        if self.known_parameters is not None:
            return self.known_parameters
        headers = [_safetensors_header(file) for file in self.path.glob("*.safetensors")]
        if not headers:
            raise _no_weights(self.name)
        return sum(math.prod(tensor["shape"]) for h in headers for name, tensor in h.items() if name != "__metadata__")

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of every file that can change a log-prob."""
        if not self.config:
            return {}
        wanted = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py")
        return {f.name: sha256(f) for f in sorted(self.path.iterdir()) if f.is_file() and f.suffix in wanted}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a `config.json`, the language model's part: all of it, unless the model sees or hears, too."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and nested else config


def read_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint folder's `config.json`.

    Raises:
        ModelError: It is missing or is not a JSON object.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is not a checkpoint folder: it has no config.json.", "Give a folder written by save_pretrained."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}).", "Restore the file.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object.", "Restore the file.")
    return config


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(min(size, _MOST_HEADER_BYTES)))
    except (OSError, ValueError, struct.error):
        raise ModelError(f"{file} is truncated or not a safetensors file.", "Download it again.") from None
    return header


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> ModelRef:
    """Finds, and where necessary fetches, a checkpoint.

    Args:
        name: Built-in name, local folder, or hub id (`organisation/model`); only a hub id touches the network.
        revision: Branch, tag or commit of a hub id. A whole commit that is in the local cache needs no network.
        trust_remote_code: Also fetches the checkpoint's Python files.
        weights: False when only a plan is wanted: of a hub id no more than `config.json` is fetched, a built-in model
            is not fetched at all, and nothing is said about what else is missing.
        log: Told what takes long.

    Raises:
        ModelError: There is no such model, or it is incomplete.
        EngineMissing: A hub id needs huggingface_hub, which is not installed.
    """
    if revision is not None and (name in BUILTINS or not _looks_like_hub_id(name)):
        raise ModelError(f"--revision applies to hub ids only, and {name!r} is not a hub id.", "Leave --revision out.")
    path, commit, known = Path(name), None, None
    if name in BUILTINS:
        builtin = BUILTINS[name]
        path = builtin_path(builtin)
        if not weights and not path.is_dir():
            return ModelRef(name, path, None, dict(builtin.config), builtin.parameters)
        path = pull(builtin, log)
    elif _looks_like_hub_id(name):
        path = _snapshot(name, revision, weights, trust_remote_code)
        commit = path.name
        known = None if weights or _has_weights(path) else _hub_parameters(name, commit)
    elif not os.path.isdir(path):
        raise ModelError(
            f"The model folder {name!r} does not exist.",
            "Give a checkpoint folder, a hub id such as organisation/model, or a built-in name "
            f"({', '.join(BUILTINS)}).",
        )
    ref = ModelRef(name, path.resolve(), commit, read_config(path), known)
    if weights and not ref.scripted:
        _check_complete(ref)
    return ref


def _looks_like_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name) and name.split("/")[0] not in (".", "..")


def _check_complete(ref: ModelRef) -> None:
    if not _has_tokenizer(ref.path):
        raise ModelError(
            f"{ref.name} has no tokenizer.", "Save the tokenizer beside the weights: tokenizer.save_pretrained(folder)."
        )
    if not any(ref.path.glob("*.safetensors")):
        raise _no_weights(ref.name)


def _no_weights(name: str) -> ModelError:
    return ModelError(
        f"{name} has no safetensors weights.",
        "Save them with model.save_pretrained(folder); pickled weights are not loaded.",
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def _has_weights(folder: Path) -> bool:
    """Whether all the weights of a hub snapshot are on this disk: a download may have been stopped midway."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
    except FileNotFoundError:
        files = {"model.safetensors"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return all((folder / file).exists() for file in files)


def _snapshot(name: str, revision: str | None, weights: bool, trust_remote_code: bool) -> Path:
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", *(["*.py"] if trust_remote_code else [])]
    if not weights:
        patterns = ["config.json"]
    with _hub_errors_as_sentences(name, revision):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        if revision is not None and _COMMIT.fullmatch(revision):
            # A commit never changes: what is here needs no network, nor a repository that still has the commit.
            with suppress(LocalEntryNotFoundError):
                path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
                # Where no listing of the commit is cached, huggingface_hub returns whatever part of it there is.
                if _has_weights(path) and _has_tokenizer(path) if weights else (path / "config.json").exists():
                    return path
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _hub_parameters(name: str, commit: str) -> int:
    """Number of weights by the hub's own reading of the safetensors headers; fetches no weights."""
    with _hub_errors_as_sentences(name, commit):
        from huggingface_hub import get_safetensors_metadata

        return sum(get_safetensors_metadata(name, revision=commit).parameter_count.values())


@contextmanager
def _hub_errors_as_sentences(name: str, revision: str | None) -> Iterator[None]:
    try:
        from huggingface_hub import errors
    except ImportError:
        raise EngineMissing(
            "huggingface_hub is not installed; hub models need it.",
            "Install an engine extra, or give a local folder.",
        ) from None
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} is gated on the hub.", "Accept its terms on the hub, then run `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r} on the hub.", "Check --revision.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(
            f"No folder and no hub model is named {name!r}.",
            "Check the name. Private models need `hf auth login`.",
        ) from None
    except errors.NotASafetensorsRepoError:
        raise _no_weights(name) from None
    except errors.SafetensorsParsingError:
        raise ModelError(
            f"The safetensors files of {name} on the hub are malformed.",
            "Report it to their owner, or give a local folder.",
        ) from None
    # The root of httpx's errors, not all of which are OSErrors; its package is named differently in hub 1 and 2.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        reason = type(error.__cause__ or error).__name__
        raise ModelError(
            f"The hub cannot be reached ({reason}), and {name} is not in the local cache.",
            "Check the network, or give a local folder.",
        ) from None
