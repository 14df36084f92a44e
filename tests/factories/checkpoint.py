"""Checkpoint folders without weights: real headers and configuration, and data that is a hole in the file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
LLAMA_7B = LLAMA | {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def llama_shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of a Llama by name."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    size = hidden // config["num_attention_heads"]
    groups = config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        names = {
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.k_proj": [groups, hidden],
            "self_attn.v_proj": [groups, hidden],
            "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [wide, hidden],
            "mlp.up_proj": [wide, hidden],
            "mlp.down_proj": [hidden, wide],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    return shapes


def write_safetensors(path: Path, shapes: Mapping[str, list[int]], dtype: str = "BF16") -> None:
    """A safetensors file by its published layout: header size in 8 bytes, JSON header, data (a hole)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = LLAMA,
    *,
    shapes: Mapping[str, list[int]] | None = None,
    shards: int = 1,
    ids: int = 128,
    files: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint folder.

    Args:
        folder: Where.
        config: `config.json`.
        shapes: Of its tensors; a Llama's by default.
        shards: Files of weights; more than one have an index.
        ids: Of the tokenizer.
        files: Other JSON files by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(config) if shapes is None else shapes
    vocabulary = {f"t{i}": i for i in range(ids)}
    written = {
        "config.json": config,
        "tokenizer.json": {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}, "added_tokens": []},
        **(files or {}),
    }
    if shards == 1:
        write_safetensors(folder / "model.safetensors", shapes)
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(shapes)}
        for file in sorted(set(weight_map.values())):
            write_safetensors(folder / file, {n: shape for n, shape in shapes.items() if weight_map[n] == file})
        written["model.safetensors.index.json"] = {"weight_map": weight_map}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
