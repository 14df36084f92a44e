"""How dtypes look in every figure, and the few matplotlib settings that make bytes reproducible.

Hue, lightness, line style and marker all differ, so that a dtype is recognised on a grey print.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib

from mismatch_probe.report.format import clipped, visible

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes

DPI = 150
_TICK_CHARACTERS = 28
_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Look:
    color: str
    linestyle: str
    marker: str


_LOOKS = {
    "bfloat16": Look("#d95f02", "-", "o"),
    "float16": Look("#1f5fa8", "--", "s"),
    "float32": Look("#111111", ":", "^"),
}
_OTHERS = (Look("#7a3b8f", "-.", "D"), Look("#5a8f29", "-.", "v"))


def look(dtype: str, index: int = 0) -> Look:
    """The look of `dtype`; dtypes without a look of their own take turns by `index`."""
    return _LOOKS.get(dtype) or _OTHERS[index % len(_OTHERS)]


def plot_settings() -> AbstractContextManager[None]:
    """The settings that every figure is drawn under, whatever the user's matplotlibrc says about them."""
    return matplotlib.rc_context(_RC)  # type: ignore[arg-type]


def tick(label: object) -> str:
    """A pair's, a dtype's or a bin's name beside an axis, a mode in parentheses on a line of its own."""
    return clipped(visible(label), _TICK_CHARACTERS).replace(" (", "\n(")


def say(axes: Axes, text: str, *, y: float = 0.5) -> None:
    """Write `text` into an empty panel."""
    axes.text(0.5, y, text, transform=axes.transAxes, ha="center", va="center", color="#555555", parse_math=False)
