"""Loads a causal language model of transformers, whole or not at all."""

from __future__ import annotations

from typing import Any

from mismatch_probe.errors import ModelError


def load_model(path: str, **options: Any) -> Any:
    """The model of a checkpoint folder.

    Args:
        path: The folder.
        options: Of transformers' `from_pretrained`.

    Raises:
        ModelError: Weights are missing. transformers would draw them at random, and say so in its log only.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, output_loading_info=True, **options
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"The checkpoint {path} has no values for {len(missing)} tensors, first {missing[0]}.",
            "Save the whole model with model.save_pretrained(folder).",
        )
    return model
