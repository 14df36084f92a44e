"""What the parts of an audit say of a model's numbers: peaks, converted weights, gradients, the FP16 pass, engine lag.

Plain documents, as `audit.json` has them. Peaks are of what is finite; what is not, even in FP32, is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.audit.job import FUSED, LAG_BATCH, histograms_of
from mismatch_probe.metrics.adam_lag import BETAS, simulate_adam
from mismatch_probe.metrics.floats import FIRST_SCALE, FORMATS, FP16, ScaleRange, scale_range, simulate_scaler
from mismatch_probe.metrics.intervals import rare_share_interval
from mismatch_probe.metrics.peaks import PeakSums, context_of
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.audit.judge import unseen_rate
from mismatch_probe.types import MetricValue, PairArrays

Document = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
KINDS = (
    "residual",
    "mlp product",
    "router logits",
    "logits",
    "softmax input",
    "attention product",
    "other",
)
_GAP = ("mean_abs_logprob_diff", "kl_k3")
_FLUSHED = 1e-3


def forward_document(facts: Document, arrays: Arrays, prompts: Sequence[str]) -> Document:
    """Peaks by tensor, by kind of tensor, by layer of the residual stream, and by context length.

    Args:
        facts, arrays: The part.
        prompts: Of each sequence that ran.
    """
    places = facts["places"]
    sums = PeakSums.of_arrays(tuple(place["name"] for place in places), dict(arrays))
    median, p99, p999 = (sums.quantile(level) for level in (0.5, 0.99, 0.999))
    rows = [
        {
            **{key: place[key] for key in ("name", "kind", "layer")},
            "peak": float(sums.largest[i]),
            "first_token_peak": float(sums.first[i]),
            "rest_peak": float(sums.rest[i]),
            "rest_median": float(median[i]),
            "rest_p99": float(p99[i]),
            "rest_p999": float(p999[i]),
            "n_overflow": int(sums.n_overflow[i]),
            "n_nonfinite": int(sums.n_nonfinite[i]),
            "sequence": int(sums.at[i, 0]),
            "position": int(sums.at[i, 1]) if place["placed"] else None,
        }
        for i, place in enumerate(places)
    ]
    # Fused attention keeps its products in FP32; eager attention makes them in the dtype like everything else.
    apart = FUSED if facts["fused"] else ()
    made = [row for row in rows if row["kind"] not in apart]
    residual = [i for i, place in enumerate(places) if place["kind"] == "residual"]
    context = sums.by_context[[i for i, row in enumerate(rows) if row["kind"] not in apart]].max(axis=0)
    hits = np.bincount(_index(prompts), weights=sums.overflow_by_sequence).astype(np.float64)
    counts = np.bincount(_index(prompts), weights=sums.lengths).astype(np.float64)
    # Without any hit tokens of a prompt are not known to be independent: the prompt is the unit (judge.py).
    rate = unseen_rate(len(counts))
    if hits.any():
        rate = MetricValue(float(hits.sum() / counts.sum()), *rare_share_interval(hits, counts))
    over = [row for row in made if row["n_overflow"]]
    largest = max(made, key=lambda row: row["peak"])
    # What is less than a bit smaller and came earlier is where the largest comes from.
    source = next(row["name"] for row in made if row["peak"] >= largest["peak"] / 2)
    return {
        "n_sequences": len(sums.lengths),
        "n_prompts": len(set(prompts)),
        "n_tokens": sum(sums.lengths),
        "longest": sums.longest,
        "fused_attention": facts["fused"],
        "overflow_tokens": rate.as_dict() | {"n": int(hits.sum()), "n_prompts": int(np.count_nonzero(hits))},
        "largest": largest,
        "source": source,
        "first_overflow": over[0]["name"] if over else None,
        "kinds": {kind: _largest(rows, kind) for kind in KINDS if any(row["kind"] == kind for row in rows)},
        "residual_by_layer": [_layer(places, rows, index) for index in range(len(facts["layers"]))],
        "by_context": [
            {"first": context_of(i)[0], "last": context_of(i)[1], "peak": float(context[i]), "residual": float(top)}
            for i, top in enumerate(sums.by_context[residual].max(axis=0) if residual else context)
            if context_of(i)[0] < sums.longest
        ],
        "tensors": rows,
    }


def weights_document(facts: Document) -> Document:
    """Conversion of weights, the worst tensor of each format first named."""
    found: Document = {}
    for dtype in ("float16", "bfloat16"):
        rows = [row for row in facts["rows"] if row["dtype"] == dtype]
        # Of vectors, a bias near 0 may vanish without a trace, so that a matrix is what can be bad.
        worst = max(rows, key=lambda row: (row["n_nonfinite"] + row["n_overflow"] > 0, row["ndim"] > 1, row["error"]))
        found[dtype] = {
            "worst": worst,
            "n_nonfinite": sum(row["n_nonfinite"] for row in rows),
            "n_overflow": sum(row["n_overflow"] for row in rows),
            "n_flushed": sum(row["n_flushed"] for row in rows),
            "n_subnormal": sum(row["n_subnormal"] for row in rows),
            "n": sum(row["n"] for row in rows),
        }
    return {**found, "tensors": facts["rows"]}


def backward_document(facts: Document, arrays: Arrays, prompts: Sequence[str]) -> Document:
    """Gradients by tensor, what FP16 flushes of them without a loss scale, and the loss scales that serve them all.

    Args:
        facts, arrays: The part.
        prompts: Of each sequence of the calibration, of which the first ones were taken.
    """
    histograms = histograms_of(facts, arrays)
    scales = scale_range(histograms, flushed=_FLUSHED)
    total = sum(float(h.mass[:-1].sum()) for h in histograms.values())
    lost = sum(float(h.mass[:-1].sum()) * h.flushed_share(0) for h in histograms.values())
    rows = []
    for name, h in histograms.items():
        own = scale_range({name: h}, flushed=_FLUSHED)
        rows.append(
            {
                "name": name,
                "largest": h.largest,
                "n_nonfinite": h.n_nonfinite,
                "flushed_unscaled": h.flushed_share(0),
                "scale_low": None if own is None else own.low,
                "scale_high": None if own is None else own.high,
            }
        )
    largest = [float(value) for value in arrays["largest_by_sequence"] if np.isfinite(value)]
    trace = simulate_scaler(largest) if any(largest) else None
    by_exponent = {
        side: _by_exponent(
            [h for name, h in histograms.items() if name.endswith(" (activation)") == (side != "weight")]
        )
        for side in ("weight", "activation")
    }
    return {
        "loss": "−Σ A log π / N over response tokens, A = ±1, one sequence at a time",
        "step_tokens": facts["step_tokens"],
        "n_sequences": len(arrays["largest_by_sequence"]),
        "n_prompts": len(set(prompts[: len(arrays["largest_by_sequence"])])),
        "n_tokens": facts["n_tokens"],
        "largest": max((h.largest for h in histograms.values()), default=0.0),
        "flushed_unscaled": lost / total if total else 0.0,
        "scales": None if scales is None else vars(scales),
        "flushed_allowed": _FLUSHED,
        "start_exponent": FIRST_SCALE,
        "overflow_at_start": _first_over(histograms, FIRST_SCALE),
        "scaler": None if trace is None else vars(trace) | {"settled": list(trace.settled)},
        "mass_by_exponent": by_exponent,
        "tensors": rows,
    }


def lag_document(
    lag: tuple[Document, Arrays],
    backward: tuple[Document, Arrays] | None,
    prompts: Sequence[str],
    rates: Sequence[float],
    layers: Sequence[int | None],
) -> Document:
    """How far the engine lags behind the masters.

    Args:
        lag, backward: The parts; without the second one there is no motion.
        prompts: Of each sequence that was scored.
        rates: Learning rates.
        layers: Layer of each tensor that weights were sampled of.
    """
    facts, arrays = lag
    cases = []
    for case in facts["cases"]:
        masters, engine = arrays[f"masters-{case['name']}"], arrays[f"engine-{case['name']}"]
        sequence = np.asarray(arrays["sequence"], np.int64)
        prompt, names = _index(prompts), tuple(dict.fromkeys(prompts))
        position = np.arange(len(sequence)) - np.searchsorted(sequence, sequence)
        pair = PairArrays(engine, masters, sequence, position, prompt, names, False, "both sides are the trainer's")
        gap = {key: value.as_dict() for key, value in compute_metrics(pair, keys=_GAP).items()}
        cases.append({**case, **gap})
    motion = None if backward is None else _motion(backward, rates, layers)
    return {"cases": cases, "n_sequences": len(prompts), "batch": LAG_BATCH, "motion": motion}


def _motion(backward: tuple[Document, Arrays], rates: Sequence[float], layers: Sequence[int | None]) -> Document:
    arrays = backward[1]
    formats = (FORMATS["bfloat16"], FORMATS["float16"])
    weights = np.asarray(arrays["weights"], np.float64)
    motion = simulate_adam(weights, arrays["gradients"], tuple(rates), formats, batch=LAG_BATCH)
    alive, tensor = motion.alive, np.asarray(arrays["tensor"])
    layer = np.array([-1 if found is None else found for found in layers])[tensor]
    rows = []
    for form in formats:
        ulp = form.ulp(form.rounded(weights[alive]))
        for rate in rates:
            # A move of more than a unit reaches the engine as surely as one of a unit, however near to 0 the weight is.
            steady, first = (np.minimum(rate * u[alive] / ulp, 1.0) for u in (motion.steady, motion.first))
            walk, generic = (found[form.name, rate][alive] for found in (motion.passed, motion.passed_generic))
            rows.append(
                {
                    "dtype": form.name,
                    "rate": rate,
                    "first_ulp": _of(np.mean, first),
                    "first_reached": _of(np.mean, first > 0.5),
                    "steady_ulp": _of(np.mean, steady),
                    "steady_ulp_median": _of(np.median, steady),
                    # Always pushed one way a weight moves by the learning rate, and has half a unit to go: exactly so
                    # from the grid, on average from anywhere between.
                    "straight_steps": _of(np.median, np.maximum(0.5 * ulp / rate, 1.0)),
                    "walk_steps": _median_step(walk),
                    "walk_steps_generic": _median_step(generic),
                    "walk_reached": _of(np.mean, walk > 0),
                    "walk_reached_generic": _of(np.mean, generic > 0),
                    "by_layer": [
                        {"layer": int(i), "steady_ulp": float(steady[layer[alive] == i].mean())}
                        for i in np.unique(layer[alive])
                        if i >= 0
                    ],
                }
            )
    return {
        "steps": motion.steps,
        "betas": list(BETAS),
        "n_weights": int(alive.sum()),
        "n_without_gradient": int((~alive).sum()),
        "rows": rows,
    }


def _of(statistic: Callable[..., Any], values: NDArray[Any]) -> float | None:
    """A statistic, None of nothing."""
    return float(statistic(values)) if len(values) else None


def _median_step(passed: NDArray[np.int64]) -> int | None:
    """The step by which half of the weights had reached the engine; None where that took longer than was simulated."""
    reached = np.sort(passed[passed > 0])
    half = -(-len(passed) // 2)
    return int(reached[half - 1]) if len(reached) >= half > 0 else None


def _index(prompts: Sequence[str]) -> NDArray[np.int64]:
    names = {name: i for i, name in enumerate(dict.fromkeys(prompts))}
    return np.array([names[prompt] for prompt in prompts], np.int64)


def _largest(rows: Sequence[Document], kind: str) -> Document:
    """Of a kind of tensor, the one with the largest peak; what a dtype has no number for is named by dtype."""
    top = max((row for row in rows if row["kind"] == kind), key=lambda row: row["peak"])
    overflow = {name: bool(top["peak"] >= form.overflows_from or top["n_nonfinite"]) for name, form in FORMATS.items()}
    return {**top, "overflow": overflow}


def _layer(places: Sequence[Document], rows: Sequence[Document], index: int) -> Document:
    found = [row for row in rows if row["kind"] == "residual" and row["layer"] == index]
    keys = ("first_token_peak", "rest_peak", "rest_median", "rest_p999")
    return {"layer": index, **{key: max((row[key] for row in found), default=0.0) for key in keys}}


def _by_exponent(histograms: Sequence[Any]) -> list[list[float]]:
    """`[exponent, Σ|g|]` of the bins that hold anything."""
    if not histograms:
        return []
    mass = np.sum([h.mass for h in histograms], axis=0)
    return [[int(i) - 127, float(mass[i])] for i in np.flatnonzero(mass[:-1])]


def _first_over(histograms: Mapping[str, Any], exponent: int) -> str | None:
    """The first tensor, in the order of the backward pass, that a loss scale of 2^exponent overflows."""
    return next((name for name, h in histograms.items() if h.overflows(exponent)), None)


def scales_of(backward: Mapping[str, Any]) -> ScaleRange | None:
    """The range of loss scales of a document."""
    return None if backward["scales"] is None else ScaleRange(**backward["scales"])


def headroom(peak: float) -> float | None:
    """FP16's largest number over a peak; None for a peak of 0."""
    return FP16.largest / peak if peak > 0 else None
