"""Rows of `attribution.json` on both models' insides, by hand and drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from mismatch_probe.metrics.conclusions import Left
from mismatch_probe.metrics.inside import expected, locate
from mismatch_probe.types import DTYPES

LAYERS = 4
BF16, FP16, FP32 = DTYPES


def row_of(
    dtype: str, scores: dict[tuple[int | None, str, str], float], steps: list[float], stream: float = 0.6
) -> Any:
    """A dtype's rows of `attribution.json`: scores by (layer, name within it, kind)."""
    limit = float(expected(np.zeros(1), dtype)[0])
    modules = [
        {
            "name": name if layer is None else f"m.{layer}.{name}".rstrip("."),
            "layer": layer,
            "kind": kind,
            "apart": score * limit,
            "trainer_error": 0.0,
            "score": score,
        }
        for (layer, name, kind), score in scores.items()
    ]
    columns = zip(*((m["name"], m["layer"], m["kind"], m["score"]) for m in modules), strict=True)
    names, layers, kinds, found = columns
    return {
        "layers": [{"layer": i, "score": s, "step": s * limit, "step_expected": limit} for i, s in enumerate(steps)],
        "modules": modules,
        "located": locate(names, layers, kinds, np.array(found), LAYERS).as_dict(),
        "end_score": stream,
    }


def quiet(dtype: str, step: float = 0.8, *, ends: bool = True, **beyond: float) -> Any:
    """Nothing stands out but what `beyond` names by kind, in layer 2, whose step has the given score."""
    scores = {(i, "mlp", "module"): 0.7 for i in range(LAYERS)} | {(i, "mlp", "between"): 0.7 for i in range(LAYERS)}
    scores |= {(i, "", "end"): 0.0 for i in range(LAYERS)} if ends else {}
    scores |= {(2, "" if kind == "end" else "mlp", kind): score for kind, score in beyond.items()}
    return row_of(dtype, scores, [0.8, 0.7, step, 0.8])


SCORES = st.one_of(st.floats(0, 1.9), st.floats(2.1, 1e6), st.just(np.inf))


@st.composite
def results(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[str, str], Left, bool]:
    """Any rows of any dtypes, of a model with experts or without, and what FP32 leaves of the gap."""
    rows: dict[str, Any] = {}
    for dtype in draw(st.lists(st.sampled_from(DTYPES), unique=True)):
        places = [(i, name, kind) for i in range(LAYERS) for name, kind in (("mlp", "module"), ("mlp", "between"))]
        places += [(i, "", "end") for i in range(LAYERS)] if draw(st.booleans()) else []
        scores = dict.fromkeys([*places, (None, "head", "module")], 0.7)
        for place in draw(st.lists(st.sampled_from(places), max_size=3)):
            scores[place] = draw(SCORES)
        steps = [draw(st.sampled_from([0.8, 0.8, 3.0, 1e5])) for _ in range(LAYERS)]
        row = row_of(dtype, scores, steps, draw(st.sampled_from([0.6, 30.0])))
        rows[dtype] = row if draw(st.integers(0, 9)) else {"located": None, "modules": [], "layers": []}
    pair = (draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)))
    left = Left(draw(st.floats(0, 1.2)), draw(st.sampled_from([1e-5, 0.1]))) if draw(st.booleans()) else Left()
    return rows, pair, Left() if pair == (FP32, FP32) else left, draw(st.booleans())
