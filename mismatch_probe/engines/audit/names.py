"""Names of modules, without torch."""

from __future__ import annotations

import re

_LAYER = re.compile(r"\.(\d+)(\.|$)")


def layer_of(name: str) -> int | None:
    """Index of the decoder layer in a module's or a weight's name, None outside of them."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None
