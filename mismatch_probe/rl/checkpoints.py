"""Checkpoints of an RL run: a folder that any tool can load as a model, with what it takes to go on from there.

No pickle: tensors are safetensors, everything else is JSON. A folder appears by rename, so it is whole or not there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mismatch_probe.errors import DiskFull, TableError

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from.

    Attributes:
        weights: FP32.
        moments: Of the optimizer, by parameter.
        history: Weights of earlier steps, oldest first, where stale weights are rolled out.
        state: Everything else, as JSON; `step` is the next one.
    """

    weights: Weights
    moments: Weights
    history: Sequence[Weights]
    state: dict[str, Any]


def save_checkpoint(folder: Path, model: Any, checkpoint: Checkpoint, source: Path) -> Path:
    """Writes `folder/step-000012`.

    Args:
        folder: Of all checkpoints.
        model: The model, whose `save_pretrained` writes the part that any tool can load.
        checkpoint: What to keep.
        source: Folder of the original model, for its tokenizer.

    Raises:
        DiskFull: There is no room; earlier checkpoints stay.
        TableError: It cannot be written.
    """
    target = folder / f"step-{checkpoint.state['step']:06d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        for name in _TOKENIZER:
            if (source / name).exists():
                shutil.copy(source / name, temporary / name)
        save_file(_contiguous(checkpoint.weights), temporary / "masters.st")
        save_file(_contiguous(checkpoint.moments), temporary / "optimizer.st")
        for index, weights in enumerate(checkpoint.history):
            save_file(_contiguous(weights), temporary / f"history-{index}.st")
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, allow_nan=False), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as an error of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFull(
                f"The disk is full: checkpoint {target.name} was not written.",
                "Free space, then continue with --resume. Earlier checkpoints are kept.",
            ) from error
        if isinstance(error, OSError):
            raise TableError(
                f"{target} cannot be written: {error.strerror or error}.", "Check the folder's permissions."
            ) from error
        raise
    return target


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads one.

    Raises:
        TableError: It is missing or broken.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        history = [load_file(folder / f"history-{index}.st") for index in range(int(state["n_history"]))]
        return Checkpoint(load_file(folder / "masters.st"), load_file(folder / "optimizer.st"), history, state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TableError(
            f"The checkpoint {folder} cannot be read ({type(error).__name__}).",
            "Delete it to resume from an earlier one.",
        ) from None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())


def prune(folder: Path, keep: Sequence[str]) -> None:
    """Removes all checkpoints but the named ones and the newest."""
    found = checkpoints(folder)
    for path in found[:-1]:
        if path.name not in keep:
            shutil.rmtree(path)


def _contiguous(weights: Weights) -> dict[str, torch.Tensor]:
    """safetensors wants no shared memory, which tied tensors have."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
