"""Turns a GGUF file into a BF16 safetensors checkpoint: `python -m mismatch_probe.engines.convert GGUF FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def convert(gguf: Path, target: Path) -> None:
    """Reads weights, tokenizer and chat template from `gguf` and writes a checkpoint folder to `target`.

    transformers refuses to save a model that it loaded quantised, so its dequantised weights go into a plain model of
    the same configuration.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
