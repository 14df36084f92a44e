"""What a checkpoint folder says of itself: headers, configuration, tokenizer files. No tensor is read, no code runs.

A safetensors file is 8 bytes of header length (little endian), the header as JSON, and the data; its size follows from
the header, so a truncated file shows without reading it. Which files count is decided as both engines do: transformers
5.19 takes `model.safetensors`, else the index (modeling_utils.py, `_get_resolved_checkpoint_files`); vLLM 0.32 takes
every safetensors file, or those of the index where there is one (model_loader/default_loader.py, `_prepare_weights`).
Both read `.bin` files only where no safetensors file is, and both by `torch.load(weights_only=True)`
(modeling_utils.py, `load_state_dict`; model_loader/weight_utils.py, `pt_weights_iterator`), which runs no code.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mismatch_probe.errors import ModelError

Problem = Literal["", "missing", "truncated", "longer", "malformed", "lfs-pointer"]
Format = Literal["safetensors", "bin", "none"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MOST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64}
_BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "rng_state")  # vLLM's list, and transformers'


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
        raise _no_config(Path(path)) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}).", "Restore the file.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object.", "Restore the file.")
    return config


def _no_config(folder: Path) -> ModelError:
    adapter = _json(folder / "adapter_config.json")
    if adapter:
        base = adapter.get("base_model_name_or_path") or "its base model"
        return ModelError(
            f"{folder} is a PEFT adapter of {base}, not a model.",
            "Merge it into its base model: merge_and_unload(), save_pretrained(folder), tokenizer included; give that.",
        )
    return ModelError(
        f"{folder} is not a checkpoint folder: it has no config.json.", "Give a folder written by save_pretrained."
    )


@dataclass(frozen=True)
class Tensor:
    """A tensor by its header.

    Attributes:
        dtype: As safetensors names it, e.g. `BF16`.
        shape: Its shape.
        file: The file that has it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """A file of weights.

    Attributes:
        name: Its name in the folder.
        size: Bytes on the disk; 0 where it is missing.
        wanted: Bytes by its header, None where there is none to read.
        problem: What is wrong with it, empty for nothing.
    """

    name: str
    size: int
    wanted: int | None = None
    problem: Problem = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: Where it lies.
        config: `config.json`.
        format: Of the weights.
        files: The files that both engines would load, missing ones included.
        tensors: By name, of those files that can be read; empty for `.bin`.
        index: By tensor the file that the index names; None without an index.
        extra: Other files of weights in the folder.
        both: Whether the folder has a single file beside an index that does not name it.
        generation: `generation_config.json`, empty where there is none or it cannot be read.
        adapter: `adapter_config.json`, None where there is none.
        unreadable: JSON files that cannot be read, with the reason.
    """

    folder: Path
    config: Mapping[str, Any]
    format: Format
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Tensor]
    index: Mapping[str, str] | None
    extra: tuple[str, ...]
    both: bool
    generation: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration."""
        return text_config(self.config)

    @property
    def complete(self) -> bool:
        """Whether every file of weights is there and whole, so that the list of tensors is, too."""
        return bool(self.files) and not any(file.problem for file in self.files)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def parameters(self) -> int:
        """Number of weights: by the headers, or by the size of `.bin` files and the configuration's dtype."""
        if self.format == "safetensors":
            return sum(tensor.elements for tensor in self.tensors.values())
        dtype = self.text_config.get("dtype") or self.text_config.get("torch_dtype") or "float32"
        return self.bytes // (4 if dtype == "float32" else 2)

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        return TokenizerFiles(self.folder)


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say; each is read when it is asked for.

    Attributes:
        folder: The checkpoint folder.
    """

    folder: Path

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`."""
        return _json(self.folder / "tokenizer_config.json")

    @property
    def has_chat_template(self) -> bool:
        files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
        return bool(self.settings.get("chat_template")) or any((self.folder / file).exists() for file in files)

    @cached_property
    def _whole(self) -> Mapping[str, Any]:
        return _json(self.folder / "tokenizer.json")

    @cached_property
    def largest_id(self) -> int | None:
        """The largest id of the vocabulary; None where no file lists it, as with a lone SentencePiece model."""
        model = self._whole.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if vocabulary is None:
            vocabulary = _json(self.folder / "vocab.json") or None
        return max(_ids(vocabulary), default=None)

    @cached_property
    def largest_added_id(self) -> int:
        """The largest id of the tokens that were added to the vocabulary, −1 where there are none."""
        added = (entry.get("id") for entry in self._whole.get("added_tokens") or () if isinstance(entry, dict))
        ids = [one for one in added if isinstance(one, int)]
        listed = self.settings.get("added_tokens_decoder")
        ids += [int(key) for key in listed if str(key).isdigit()] if isinstance(listed, dict) else []
        return max(ids, default=-1)


def _ids(vocabulary: Any) -> Iterator[int]:
    if isinstance(vocabulary, dict):
        yield from (value for value in vocabulary.values() if isinstance(value, int))
    elif isinstance(vocabulary, list) and vocabulary:
        yield len(vocabulary) - 1


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer is there."""
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def is_weights(bin_file: str) -> bool:
    """Whether a `.bin` file of this name is one of weights to the engines."""
    return not bin_file.startswith(_NOT_WEIGHTS)


def read_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Reads the headers and the small files of a folder whose `config.json` is known."""
    unreadable: dict[str, str] = {}
    found = {file.name for file in folder.iterdir() if file.is_file()}
    safetensors = sorted(name for name in found if name.endswith(".safetensors"))
    bins = sorted(name for name in found if name.endswith(".bin") and is_weights(name))
    index: Mapping[str, str] | None = None
    wanted: list[str]
    if safetensors or INDEX in found:
        format_, single, index_file, candidates = "safetensors", SINGLE, INDEX, safetensors
    else:
        format_, single, index_file, candidates = "bin" if bins else "none", _BIN, _BIN_INDEX, bins
    if index_file in found:
        try:
            raw = json.loads((folder / index_file).read_text(encoding="utf-8"))["weight_map"]
            index = {str(name): str(file) for name, file in raw.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            unreadable[index_file] = f"{type(error).__name__}: {error}"
    both = single in found and index is not None and single not in index.values()
    wanted = [single] if single in found or index is None else sorted(set(index.values()))
    if single not in found and index is None:
        wanted = candidates
    tensors: dict[str, Tensor] = {}
    files = []
    for name in wanted:
        file, header = _weight_file(folder / name, "safetensors" if format_ == "safetensors" else "bin")
        files.append(file)
        tensors.update(header)
    adapter = _json(folder / "adapter_config.json", unreadable) if "adapter_config.json" in found else None
    return Checkpoint(
        folder,
        config,
        format_,  # type: ignore[arg-type]
        tuple(files),
        tensors,
        index,
        tuple(name for name in candidates if name not in wanted),
        both,
        _json(folder / "generation_config.json", unreadable),
        adapter,
        unreadable,
    )


def _weight_file(path: Path, format_: Format) -> tuple[WeightFile, dict[str, Tensor]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
            if start.startswith(b"version "):  # "version https://git-lfs.github.com/spec/v1"
                return WeightFile(path.name, size, None, "lfs-pointer"), {}
            if format_ == "bin":
                # A zip file ends with its directory. Older files are pickles in sequence, which nothing here opens.
                broken = start.startswith(b"PK") and not zipfile.is_zipfile(path)
                return WeightFile(path.name, size, None, "truncated" if broken or not size else ""), {}
            if len(start) < 8:
                return WeightFile(path.name, size, 8, "truncated"), {}
            (length,) = struct.unpack("<Q", start)
            if length > _MOST_HEADER_BYTES:
                return WeightFile(path.name, size, None, "malformed"), {}
            header = handle.read(length)
    except OSError:
        return WeightFile(path.name, 0, None, "missing"), {}
    if len(header) < length:
        return WeightFile(path.name, size, 8 + length, "truncated"), {}
    try:
        return _checked(path.name, size, 8 + length, json.loads(header))
    except (ValueError, LookupError, TypeError, AttributeError):
        return WeightFile(path.name, size, None, "malformed"), {}


def _checked(name: str, size: int, start: int, header: dict[str, Any]) -> tuple[WeightFile, dict[str, Tensor]]:
    tensors = {}
    end = 0
    for tensor_name, entry in header.items():
        if tensor_name == "__metadata__":
            continue
        begin, stop = entry["data_offsets"]
        tensor = Tensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), name)
        bits = _BITS.get(tensor.dtype, 8)
        if (stop - begin) * 8 != math.prod(tensor.shape) * bits and tensor.dtype in _BITS:
            return WeightFile(name, size, None, "malformed"), {}
        end = max(end, stop)
        tensors[tensor_name] = tensor
    wanted = start + end
    problem: Problem = "truncated" if size < wanted else "longer" if size > wanted else ""
    return WeightFile(name, size, wanted, problem), tensors


def _json(path: Path, unreadable: dict[str, str] | None = None) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if unreadable is not None:
            unreadable[path.name] = f"{type(error).__name__}: {error}"
        return {}
    return found if isinstance(found, dict) else {}


def count_tokens(folder: Path, texts: Sequence[str]) -> list[int] | None:
    """Tokens of each text by `tokenizer.json`, without special ones; None where that cannot be read.

    The package `tokenizers` comes with both engines and imports neither.
    """
    file = folder / "tokenizer.json"
    if not file.exists() or find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        return [len(found.ids) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    except Exception:  # the package raises Exception itself
        return None
