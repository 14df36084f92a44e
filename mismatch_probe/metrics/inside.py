"""Where inside a network two engines part: relative errors by layer and module, and whether one of them stands out.

Two engines that only round differently are apart by what both round: √2 times the error that one of them makes
against a wider forward pass on the same input, when the errors are independent. A module's *score* is how far apart
they are over that; a fault in one of them shows as a score that rounding does not reach.

Shape legend: `M` tensors, `S` sequences, `L` layers, `Q` rows whose logits were kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.types import DTYPES, MetricValue

Floats = NDArray[np.float64]
Kind = Literal["module", "between", "end"]
Verdict = Literal["layer", "everywhere", "outside", "not finite", "no single layer"]
# Scores of clean pairs of engines stay below 1.5 (validation/clean_families.py); 2 leaves room for other kernels.
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

    verdict: Verdict
    name: str
    kind: Kind | Literal[""]
    layer: int | None
    score: float


NOTHING = Located("no single layer", "", "", None, 0.0)
# JSON has no infinity: a score that is not finite is this.
ENDLESS = 1e30


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer, compared on both sides. Relative errors are RMS differences over the RMS of what they are of.

    Attributes:
        layer: Its index.
        relative_error: Of the residual stream after it, which holds what all layers before have added; None where it
            is not finite.
        step: How far apart the sides are after this layer when both are given the engine's input; None likewise.
        step_expected: How far apart rounding lets them be there; None likewise.
        score: `step` over `step_expected`; `ENDLESS` where a tensor is not finite.
        lens_kl: KL(rollout‖trainer), nats per position, of what both residual streams would predict if the head came
            next; None where it was not computed.
    """

    layer: int
    relative_error: float | None
    step: float | None
    step_expected: float | None
    score: float
    lens_kl: float | None


@dataclass(frozen=True)
class TensorRow:
    """One tensor inside the models, compared where both sides are given the engine's input. Errors are relative.

    Attributes:
        name: Of its module.
        layer: Index of its layer, None outside of the layers.
        kind: As in `Located`.
        apart: How far apart the sides are; None where it is not finite, as below.
        engine_error, trainer_error: Of each side against a wider forward pass.
        score: `apart` over what rounding lets it be; `ENDLESS` where a tensor is not finite.
    """

    name: str
    layer: int | None
    kind: Kind
    apart: float | None
    engine_error: float | None
    trainer_error: float | None
    score: float


@dataclass(frozen=True)
class Inside:
    """Both models layer by layer and module by module, in one dtype.

    Attributes:
        why: Why nothing was compared; empty where something was.
        n_tokens, n_sequences: What was run through both.
        layers: In order.
        growth_per_layer: Factor by which the residual stream's relative error grows from a layer to the next.
        first_beyond: Index of the first layer whose score is beyond the threshold, None without any.
        worst_layer: Index of the layer with the largest score.
        end_score: Of the last layer's residual stream: what all layers together have added, over what rounding lets
            them add; None where there is no layer.
        tensors: Those that stand on their own: modules' results, what reaches modules, and ends of layers.
        located: What stands out among them; None where nothing was compared.
    """

    why: str = ""
    n_tokens: int = 0
    n_sequences: int = 0
    layers: tuple[LayerRow, ...] = ()
    growth_per_layer: MetricValue | None = None
    first_beyond: int | None = None
    worst_layer: int | None = None
    end_score: float | None = None
    tensors: tuple[TensorRow, ...] = ()
    located: Located | None = None


def inside_of(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], dtype: str) -> Inside:
    """Layers and tensors of a dtype.

    Args:
        facts: `records` of `M` tensors (`kind`, `name`, `layer`), `trained_layers` and `layers` with a lens, by name.
        arrays: `apart`, `engine`, `trainer` and `size` `[M, S]` sums of squares, `lens` `[L, Q]` nats.
        dtype: In which both sides compute.
    """
    records, names = facts["records"], list(facts["trained_layers"])
    apart, engine, trainer = (relative(arrays[k], arrays["size"]) for k in ("apart", "engine", "trainer"))
    score = scores(apart, trainer, dtype)
    lens = dict(zip(facts["layers"], arrays["lens"].mean(1).tolist(), strict=True)) if facts["layers"] else {}
    by = {(record["kind"], record["name"]): index for index, record in enumerate(records)}
    layers = []
    for index, name in enumerate(names):
        stream, own = by.get(("stream", name)), by.get(("layer", name))
        if stream is not None and own is not None:
            limit, kl = _known(expected(trainer, dtype)[own]), _known(lens.get(name, np.nan))
            layers.append(LayerRow(index, _known(apart[stream]), _known(apart[own]), limit, _bounded(score[own]), kl))
    kept = [i for i, record in enumerate(records) if record["kind"] in ("module", "between", "end")]
    tensors = tuple(
        TensorRow(
            records[i]["name"],
            records[i]["layer"],
            records[i]["kind"],
            _known(apart[i]),
            _known(engine[i]),
            _known(trainer[i]),
            _bounded(score[i]),
        )
        for i in kept
    )
    kinds = [tensor.kind for tensor in tensors]
    located = locate([t.name for t in tensors], [t.layer for t in tensors], kinds, score[kept], len(names))
    streams = [by["stream", name] for name in names if ("stream", name) in by]
    first = first_beyond(np.array([row.score for row in layers], np.float64))
    worst = max(layers, key=lambda row: row.score, default=None)
    return Inside(
        "",
        int(arrays["size"][streams[0]].sum()) if streams else 0,
        int(arrays["size"].shape[1]),
        tuple(layers),
        growth(arrays["apart"][streams], arrays["size"][streams]),
        None if first is None else layers[first].layer,
        None if worst is None else worst.layer,
        _bounded(score[streams[-1]]) if streams else None,
        tensors,
        replace(located, score=_bounded(located.score)),
    )


def _bounded(value: float) -> float:
    return float(min(value, ENDLESS))


def _known(value: float) -> float | None:
    """JSON has no NaN: then there is none."""
    return float(value) if np.isfinite(value) else None


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
    names: Sequence[str], layers: Sequence[int | None], kinds: Sequence[Kind], found: Floats, count: int
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
        return NOTHING
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
