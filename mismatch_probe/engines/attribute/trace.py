"""What an engine computed inside, on disk: one file of tensors a decoder layer, so that no side holds a whole model's.

A record is the input or the output of a module: `[R, W]`, a row per token, sequences one after the other. Its name is
the module's within its layer, with `.in` or `.out`; the layer's own are `.in` and `.out`.

Activations are the user's data: files are private, sized before they are made, and deleted once compared.

Shape legend: `R` tokens of all traced sequences, `W` width of a module, `K` experts of a token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.checkpoint import text_config
from mismatch_probe.errors import EngineError

if TYPE_CHECKING:
    import torch

MOST_BYTES = 1 << 29
MOST_ROWS = 1024
LOGIT_ROWS = 32
OUTSIDE = "outside"
_FACTS = "trace.json"


@dataclass(frozen=True)
class TraceRequest:
    """Sequences whose insides are kept.

    Attributes:
        folder: Where; made by the engine.
        sequences: Their ids, prompt and response.
        layers: How many decoder layers the model has.
        logit_rows: Rows, of all, whose logits are kept.
    """

    folder: str
    sequences: tuple[tuple[int, ...], ...]
    layers: int
    logit_rows: tuple[int, ...]


@dataclass(frozen=True)
class Routers:
    """What a mixture of experts looks like.

    Attributes:
        layers: Decoder layers of the model.
        experts: Experts of a layer.
        chosen: Experts of a token.
        most_tokens: What the engine's scheduler takes at once; needed for whole sequences alone.
    """

    layers: int
    experts: int
    chosen: int
    most_tokens: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], most_tokens: int = 0) -> Routers:
        """Those of a model by its `config.json`; arguments as above."""
        return cls(layers_of(config), experts_of(config), experts_per_token(config), most_tokens)


@dataclass(frozen=True)
class Routes:
    """Which experts an engine sent tokens to.

    Attributes:
        layers: Indices of the `L` layers with a router.
        experts: `[L, R, K]` by layer and token, the likeliest first, sequences one after the other.
        logprobs: Of each sequence, what `RolloutEngine.score` gives, of the same prefill.
    """

    layers: Sequence[int]
    experts: NDArray[np.int16]
    logprobs: Sequence[NDArray[np.float32]]


def choose_sequences(
    lengths: Sequence[int], config: Mapping[str, Any], itemsize: int, most_rows: int
) -> list[tuple[int, int]]:
    """(index, tokens) of the first sequences whose records fit the limits; of the very first a beginning, at least.

    Args:
        lengths: Tokens of each.
        config: The model's `config.json`.
        itemsize: Bytes of an activation.
        most_rows: What the engine takes at once.
    """
    limit = max(2, min(most_rows, MOST_ROWS, MOST_BYTES // row_bytes(config, itemsize)))
    chosen, rows = [(0, min(lengths[0], limit))], lengths[0]
    for index, length in enumerate(lengths[1:], start=1):
        if rows + length > limit:
            break
        chosen.append((index, length))
        rows += length
    return chosen


def row_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of a token's records: inputs and outputs of every layer, its blocks, and its projections."""
    nested = text_config(config)
    hidden = int(nested.get("hidden_size") or nested.get("n_embd") or 4096)
    inner = int(nested.get("intermediate_size") or 4 * hidden)
    return (layers_of(config) or 32) * (16 * hidden + 4 * inner) * itemsize


def layers_of(config: Mapping[str, Any]) -> int:
    """Decoder layers by `config.json`, under whatever name an architecture has for them; 0 where it has none."""
    nested = text_config(config)
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return next((int(nested[name]) for name in names if nested.get(name)), 0)


def experts_of(config: Mapping[str, Any]) -> int:
    """Experts of a layer by `config.json`, 0 for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(found) for name in names if (found := text_config(config).get(name))), 0)


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Experts of a token by `config.json`, 0 where it does not say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
    return next((int(found) for name in names if (found := text_config(config).get(name))), 0)


def why_no_routes(config: Mapping[str, Any]) -> str:
    """Why a model's routes cannot be read off its routers' logits; empty where they can."""
    if not experts_of(config):
        return "the model has no routers"
    nested = text_config(config)
    if not experts_per_token(config) or not layers_of(config):
        return "the checkpoint's config.json does not say how many experts a token has"
    grouped = int(nested.get("n_group") or 1) > 1 or nested.get("scoring_func") == "sigmoid"
    if grouped or nested.get("topk_method") == "noaux_tc":
        return "its routers choose by more than their logits (groups, a correction), which is not read here"
    return ""


def check_room(folder: Path, needed: int) -> None:
    """Raises:
    EngineError: The disk has not twice the room that a trace takes.
    """
    if shutil.disk_usage(folder).free < 2 * needed:
        raise EngineError(
            f"The disk has no room for a trace of {needed / 2**20:.0f} MiB.", "Free space, then continue with --resume."
        )


class TraceFiles:
    """The files of a trace.

    Args:
        folder: Theirs alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def write(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes the records of a layer, or of what lies `OUTSIDE` of them."""
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"{part}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        path.chmod(0o600)

    def read(self, part: str) -> dict[str, torch.Tensor]:
        """Reads them; in a dtype of their own. Empty where nothing of the part was kept."""
        from safetensors.torch import load_file

        path = self._folder / f"{part}.safetensors"
        found: dict[str, torch.Tensor] = load_file(path) if path.exists() else {}
        return found

    def write_facts(
        self, request: TraceRequest, fused: Mapping[str, Sequence[str]], renamed: Sequence[tuple[str, str]]
    ) -> None:
        """Writes the last file, which makes the trace whole.

        Args:
            request: What was traced.
            fused: Modules of the engine that several of transformers are, by name.
            renamed: Blocks by their names in transformers and in the engine.
        """
        about = {"request": asdict(request), "fused": {k: list(v) for k, v in fused.items()}, "renamed": list(renamed)}
        path = self._folder / _FACTS
        path.write_text(json.dumps(about), encoding="utf-8")
        path.chmod(0o600)

    @property
    def whole(self) -> bool:
        """Whether the trace was finished."""
        return (self._folder / _FACTS).exists()

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._folder / _FACTS).read_text(encoding="utf-8"))
        return found

    def discard(self) -> None:
        """Deletes all of them."""
        with suppress(OSError):
            shutil.rmtree(self._folder)
