"""Names of modules, without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"\.(\d+)(\.|$)")


def layer_index(layers: Sequence[str], name: str) -> int | None:
    """Index, among named layers, of the one that a module is or lies in; None outside of them."""
    return next((i for i, layer in enumerate(layers) if name == layer or name.startswith(f"{layer}.")), None)


def layer_of(name: str) -> int | None:
    """Index of the decoder layer in a module's or a weight's name, None outside of them."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None
