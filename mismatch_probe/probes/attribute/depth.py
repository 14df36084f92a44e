"""Both models layer by layer and module by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import inside
from mismatch_probe.probes.attribute.evidence import Evidence, finite, number
from mismatch_probe.probes.attribute.names import inside_name


def layer_rows(evidence: Evidence, knobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Layer curves by dtype, and what the hooks' eager mode is apart from the baseline; `knobs` are the rows of all by
    name.
    """
    found = {dtype: _inside(evidence, dtype) for dtype in evidence.readings.layer_dtypes}
    eager = evidence.base.eager
    row = knobs["rollout-compiled" if eager else "rollout-eager"]
    shift = row["shift"] if row["status"] == "measured" else None
    return {
        "dtypes": found,
        "threshold": inside.THRESHOLD,
        "rollout_eager": eager,
        "eager_vs_compiled_shift": shift,
        "eager_note": "The rollout ran eager, as its layers were looked into."
        if eager
        else "Layers were looked into in eager mode, which the rollout did not run in.",
        "why": evidence.readings.why_no_layers,
    }


def _inside(evidence: Evidence, dtype: str) -> dict[str, Any]:
    part = evidence.parts.get(inside_name(dtype))
    if part is None or "records" not in part[0]:
        return {"why": evidence.why(inside_name(dtype)), "layers": [], "modules": [], "located": None}
    return inside_row(*part, dtype)


def inside_row(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], dtype: str) -> dict[str, Any]:
    """Layers and modules of a dtype, from what `InsideJob` keeps of it."""
    records, names = facts["records"], list(facts["trained_layers"])
    apart, engine, trainer = (inside.relative(arrays[k], arrays["size"]) for k in ("apart", "engine", "trainer"))
    score = inside.scores(apart, trainer, dtype)
    lens = dict(zip(facts["layers"], arrays["lens"].mean(1).tolist(), strict=True)) if facts["layers"] else {}
    by = {(record["kind"], record["name"]): index for index, record in enumerate(records)}
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        stream, own = by.get(("stream", name)), by.get(("layer", name))
        if stream is not None and own is not None:
            rows.append(
                {
                    "layer": index,
                    "relative_error": number(apart[stream]),
                    "step": number(apart[own]),
                    "step_expected": number(inside.expected(trainer, dtype)[own]),
                    "score": finite(score[own]),
                    "lens_kl": number(lens.get(name, np.nan)),
                }
            )
    modules = [i for i, record in enumerate(records) if record["kind"] in ("module", "between", "end")]
    found = [records[i] for i in modules]
    located = inside.locate(
        [record["name"] for record in found],
        [record["layer"] for record in found],
        [record["kind"] for record in found],
        score[modules],
        len(names),
    )
    streams = [by["stream", name] for name in names if ("stream", name) in by]
    step_scores = np.array([row["score"] for row in rows], np.float64)
    first = inside.first_beyond(step_scores)
    worst = max(rows, key=lambda row: float(row["score"]), default=None)
    return {
        "why": "",
        "n_tokens": int(arrays["size"][streams[0]].sum()) if streams else 0,
        "n_sequences": int(arrays["size"].shape[1]),
        "layers": rows,
        "growth_per_layer": inside.growth(arrays["apart"][streams], arrays["size"][streams]).as_dict(),
        "first_beyond": None if first is None else rows[first]["layer"],
        "worst_layer": None if worst is None else worst["layer"],
        # What all layers together have added, over what rounding lets them add.
        "end_score": finite(score[streams[-1]]) if streams else None,
        "modules": [
            {
                "name": records[i]["name"],
                "layer": records[i]["layer"],
                "kind": records[i]["kind"],
                "apart": number(apart[i]),
                "engine_error": number(engine[i]),
                "trainer_error": number(trainer[i]),
                "score": finite(score[i]),
            }
            for i in modules
        ],
        "located": located.as_dict() | {"score": finite(located.score)},
    }
