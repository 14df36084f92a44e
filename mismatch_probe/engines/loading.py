"""Loads a causal language model of transformers, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mismatch_probe.errors import ModelError

if TYPE_CHECKING:
    import torch

_FIX = "Save the whole model with model.save_pretrained(folder)."


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
            _FIX,
        )
    return model


def with_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A model like this one, in its dtype, with other weights.

    Args:
        model: Of transformers; it stays as it is.
        weights: By the names of a checkpoint, whole.

    Raises:
        ModelError: Weights are missing, or have names that the model does not know.
        RuntimeError: A shape is wrong.
    """
    other, found = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(weights), dtype=model.dtype, output_loading_info=True
    )
    for names, what in ((found["missing_keys"], "has no value for"), (found["unexpected_keys"], "has the unknown")):
        if names:
            raise ModelError(f"The checkpoint {what} {min(names)}, and {len(names) - 1} more.", _FIX)
    return other
