"""Dtypes that vLLM does not support by model type, read from its source so that nothing has to be loaded for it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_TABLE = "_FLOAT16_NOT_SUPPORTED_MODELS"


@cache
def float16_unsupported() -> dict[str, str]:
    """Model types that the installed vLLM does not run in float16, with its reason.

    Empty where vLLM is not installed, or has no table of that name (`vllm/config/model.py` of 0.32 has it): then the
    engine's own refusal is met when it starts.
    """
    spec = find_spec("vllm")  # of a package without a parent nothing is imported
    if spec is None or not spec.submodule_search_locations:
        return {}
    try:
        source = (Path(spec.submodule_search_locations[0]) / "config" / "model.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == _TABLE for target in targets):
                return {str(k): str(v) for k, v in ast.literal_eval(node.value).items()}  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, AttributeError):
        return {}
    return {}


def why_no_dtype(config: Mapping[str, Any], dtype: str) -> str:
    """Why vLLM does not support a model in a dtype, as a sentence; empty where it does, as far as is known.

    Args:
        config: The checkpoint's `config.json`; vLLM looks at its own model type, not at that of a nested text model.
        dtype: Of the engine.
    """
    kind = str(config.get("model_type", ""))
    reason = float16_unsupported().get(kind, "") if dtype == "float16" else ""
    return f"vLLM does not support float16 for model type {kind}: {reason.rstrip('.')}." if reason else ""
