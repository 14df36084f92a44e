"""Where inside a network two engines part: relative errors by layer and module, and whether one of them stands out.

Two engines that only round differently are apart by what both round: √2 times the error that one of them makes
against a wider forward pass on the same input, when the errors are independent. A module's *score* is how far apart
they are over that; a fault in one of them shows as a score that rounding does not reach.

Shape legend: `M` tensors, `S` sequences, `L` layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.types import DTYPES, MetricValue

Floats = NDArray[np.float64]
# Scores of clean pairs of engines stay below 1.5 (benchmarks/clean_families.py); 2 leaves room for other kernels.
THRESHOLD = 2.0
# RMS relative error of one rounding of a smooth distribution, in units of the unit roundoff u.
_ONE_ROUNDING = 0.42
# Unit roundoff: half the distance of neighbours at 1.
UNIT: dict[str, float] = {name: DTYPE_INFOS[name].unit_roundoff for name in DTYPES}


@dataclass(frozen=True)
class Located:
    """What stands out, if anything.

    Attributes:
        verdict: `layer` where one layer does, `everywhere` where the same module of most layers does, `outside` where
            a module outside of the layers does, `not finite` where a tensor is not, `no single layer` otherwise.
        name: The module, or for `everywhere` its name within a layer, of which the end of a layer has none; empty for
            no single layer.
        kind: `module` where its own result differs, `between` where what reaches it does, `end` where what a layer
            makes of its modules' results does.
        layer: Index of the layer.
        score: Of the module, or the largest of all.
    """

    verdict: str
    name: str
    kind: str
    layer: int | None
    score: float

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self)}


def relative(squares: Floats, size: Floats) -> Floats:
    """`[M]` relative errors from sums of squares `[M, S]`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(squares.sum(1) / size.sum(1)))


def expected(trainer: Floats, dtype: str) -> Floats:
    """How far apart rounding alone lets two engines be.

    Args:
        trainer: `[M]` relative error of one of them against a wider pass.
        dtype: In which both compute.
    """
    return np.asarray(np.sqrt(2.0) * np.maximum(trainer, _ONE_ROUNDING * UNIT[dtype]))


def scores(apart: Floats, trainer: Floats, dtype: str) -> Floats:
    """`[M]` distances over what rounding lets them be; NaN and inf stand out most."""
    found = apart / expected(trainer, dtype)
    return np.asarray(np.where(np.isfinite(found), found, np.inf))


def locate(
    names: Sequence[str], layers: Sequence[int | None], kinds: Sequence[str], found: Floats, count: int
) -> Located:
    """The module that stands out.

    Args:
        names: `M` modules, each compared on an input that both sides share.
        layers: Index of each one's layer, None outside of them.
        kinds: `module`, `between` or `end`, of each.
        found: `[M]` scores; infinite where a tensor is not finite.
        count: Decoder layers of the model.
    """
    if not len(found):
        return Located("no single layer", "", "", None, 0.0)
    worst = int(np.argmax(found))  # the first of equals: of tensors that are not finite the one that was made first
    top, kind = float(found[worst]), kinds[worst]
    if np.isinf(top):
        return Located("not finite", names[worst], kind, layers[worst], top)
    if top <= THRESHOLD:
        return Located("no single layer", "", "", None, top)
    own = place_of(names[worst], kind)
    kin = {
        layers[i]
        for i in np.flatnonzero(found > THRESHOLD)
        if kinds[i] == kind and place_of(names[i], kind) == own and layers[i] is not None
    }
    if count > 2 and len(kin) > count / 2:
        return Located("everywhere", own, kind, None, top)
    return Located("outside" if layers[worst] is None else "layer", names[worst], kind, layers[worst], top)


def place_of(name: str, kind: str) -> str:
    """What a tensor is called in every layer alike: its module, and nothing for the end of a layer."""
    return "" if kind == "end" else name.rpartition(".")[2]


def first_beyond(found: Floats) -> int | None:
    """Index of the first score beyond the threshold, None without any."""
    beyond = np.flatnonzero(found > THRESHOLD)
    return int(beyond[0]) if len(beyond) else None


def growth(squares: Floats, size: Floats) -> MetricValue:
    """The factor by which the relative error of the residual stream grows from a layer to the next.

    Args:
        squares: `[L, S]` sums of squared differences after each layer.
        size: `[L, S]` of squares.

    Returns:
        exp of the slope of log error against depth, fitted for each sequence; the interval is over sequences.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = 0.5 * (np.log(squares) - np.log(size))
    logs = logs[:, np.isfinite(logs).all(axis=0)]
    n_layers, n = logs.shape
    if n_layers < 3 or n == 0:
        return MetricValue(None, why="fewer than 3 layers" if n_layers < 3 else "a layer does not differ at all")
    depth = np.arange(n_layers) - (n_layers - 1) / 2
    slopes = depth @ logs / (depth @ depth)
    value = float(np.exp(slopes.mean()))
    if n < 2:
        return MetricValue(value, why="no interval: one sequence")
    half = float(stats.t.ppf(0.975, n - 1) * slopes.std(ddof=1) / np.sqrt(n))
    ends = np.exp([slopes.mean() - half, slopes.mean() + half])
    return MetricValue(value, float(ends[0]), float(ends[1]), why="interval over few sequences" if n < 32 else "")
