"""From a name to a checkpoint folder: a built-in model, a local folder, or a hub id. Imports no engine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.engines.builtin import BUILTINS, builtin_path, pull, sha256
from mismatch_probe.engines.checkpoint import (
    Checkpoint,
    has_tokenizer,
    is_weights,
    read_checkpoint,
    read_config,
    text_config,
)
from mismatch_probe.errors import EngineMissing, ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        """Number of weights; where they are on this disk, from the headers of their files.

        Raises:
            ModelError: There is no file of weights, or one is missing or damaged.
        """
        if self.known_parameters is not None:
            return self.known_parameters
        checkpoint = self.checkpoint()
        if checkpoint.format == "none":
            raise _no_weights(self.name)
        for file in checkpoint.files:
            if file.problem:
                raise ModelError(
                    f"{self.path / file.name} is {'missing' if file.problem == 'missing' else 'damaged'}.",
                    f"Run `mismatch-probe preflight {self.name}` to see what is wrong.",
                )
        return checkpoint.parameters

    def checkpoint(self) -> Checkpoint:
        """What its files say, without reading a tensor."""
        return read_checkpoint(self.path, self.config)

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of every file that can change a log-prob."""
        if not self.config:
            return {}
        wanted = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py")
        files = [f for f in self.path.iterdir() if f.is_file() and f.suffix in wanted]
        if not any(f.suffix == ".safetensors" for f in files):
            files += [f for f in self.path.glob("*.bin") if is_weights(f.name)]
        return {f.name: sha256(f) for f in sorted(files)}


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
    return ModelRef(name, path.resolve(), commit, read_config(path), known)


def _looks_like_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name) and name.split("/")[0] not in (".", "..")


def _no_weights(name: str) -> ModelError:
    return ModelError(f"{name} has no weights that both engines load.", "Save them with model.save_pretrained(folder).")


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
                if _has_weights(path) and has_tokenizer(path) if weights else (path / "config.json").exists():
                    return path
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if weights and not any(path.glob("*.safetensors")):
            bins = ["pytorch_model*.bin"]  # older repositories have nothing else
            path = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, *bins]))
        return path


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
