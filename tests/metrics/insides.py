"""Both models' insides, by hand and drawn at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from mismatch_probe.metrics.conclusions import Left
from mismatch_probe.metrics.inside import ENDLESS, Inside, Kind, LayerRow, TensorRow, expected, locate
from mismatch_probe.types import DTYPES

LAYERS = 4
BF16, FP16, FP32 = DTYPES
NOT_COMPARED = Inside("it ran out of memory")
Place = tuple[int | None, str, Kind]


def inside_of(dtype: str, scores: dict[Place, float], steps: list[float], stream: float | None = 0.6) -> Inside:
    """A dtype: scores of tensors by (layer, name within it, kind), and of the layers' steps."""
    limit = float(expected(np.zeros(1), dtype)[0])
    tensors = tuple(
        TensorRow(
            name if layer is None else f"m.{layer}.{name}".rstrip("."),
            layer,
            kind,
            score * limit if np.isfinite(score) else None,
            0.0,
            0.0,
            min(score, ENDLESS),
        )
        for (layer, name, kind), score in scores.items()
    )
    names, layers, kinds = ([getattr(t, field) for t in tensors] for field in ("name", "layer", "kind"))
    located = locate(names, layers, kinds, np.array(list(scores.values())), LAYERS)
    rows = tuple(LayerRow(i, 1e-3, s * limit, limit, s, None) for i, s in enumerate(steps))
    beyond = [row.layer for row in rows if row.score > 2]
    return Inside(
        n_tokens=9,
        n_sequences=2,
        layers=rows,
        first_beyond=min(beyond, default=None),
        worst_layer=0,
        end_score=stream,
        tensors=tensors,
        located=replace(located, score=min(located.score, ENDLESS)),
    )


def quiet(dtype: str, step: float = 0.8, *, ends: bool = True, stream: float | None = 0.6, **beyond: float) -> Inside:
    """Nothing stands out but what `beyond` names by kind, in layer 2, whose step has the given score."""
    kinds: list[tuple[str, Kind]] = [("mlp", "module"), ("mlp", "between")]
    scores: dict[Place, float] = {(i, name, kind): 0.7 for i in range(LAYERS) for name, kind in kinds}
    scores |= {(i, "", "end"): 0.0 for i in range(LAYERS)} if ends else {}
    scores |= {(2, "" if kind == "end" else "mlp", kind): score for kind, score in beyond.items()}  # type: ignore[misc]
    return inside_of(dtype, scores, [0.8, 0.7, step, 0.8], stream)


SCORES = st.one_of(st.floats(0, 1.9), st.floats(2.1, 1e6), st.just(np.inf))


@st.composite
def results(draw: st.DrawFn) -> tuple[dict[str, Inside], tuple[str, str], Left, bool]:
    """Any insides of any dtypes, of a model with experts or without, and what FP32 leaves of the gap."""
    insides: dict[str, Inside] = {}
    for dtype in draw(st.lists(st.sampled_from(DTYPES), unique=True)):
        kinds: list[tuple[str, Kind]] = [("mlp", "module"), ("mlp", "between")]
        places: list[Place] = [(i, name, kind) for i in range(LAYERS) for name, kind in kinds]
        places += [(i, "", "end") for i in range(LAYERS)] if draw(st.booleans()) else []
        scores: dict[Place, float] = dict.fromkeys([*places, (None, "head", "module")], 0.7)
        for place in draw(st.lists(st.sampled_from(places), max_size=3)):
            scores[place] = draw(SCORES)
        steps = [draw(st.sampled_from([0.8, 0.8, 3.0, 1e5])) for _ in range(LAYERS)]
        inside = inside_of(dtype, scores, steps, draw(st.sampled_from([0.6, 30.0])))
        insides[dtype] = inside if draw(st.integers(0, 9)) else NOT_COMPARED
    pair = (draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)))
    left = Left(draw(st.floats(0, 1.2)), draw(st.sampled_from([1e-5, 0.1]))) if draw(st.booleans()) else Left()
    return insides, pair, Left() if pair == (FP32, FP32) else left, draw(st.booleans())
