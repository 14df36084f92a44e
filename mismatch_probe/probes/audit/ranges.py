"""What the parts of an audit say of a model's numbers: peaks, converted weights, gradients, the FP16 pass, engine lag.

Peaks are of what is finite; what is not, even in FP32, is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines.audit.job import FUSED, LAG_BATCH, Part, histograms_of
from mismatch_probe.engines.audit.places import layer_of
from mismatch_probe.metrics.floats import (
    FIRST_SCALE,
    FORMATS,
    ExponentHistogram,
    scale_range,
    simulate_scaler,
)
from mismatch_probe.metrics.intervals import rare_share_interval
from mismatch_probe.metrics.ranges import BETAS, PeakSums, context_of, simulate_adam
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.audit.judge import unseen_rate
from mismatch_probe.results.ranges import (
    PARTS,
    Activations,
    ContextPeaks,
    Fp16Pass,
    Gradients,
    GradientTensor,
    KindPeak,
    Lag,
    LagCase,
    LayerMotion,
    LayerPeaks,
    Motion,
    PartName,
    Peak,
    Range,
    WeightMotion,
    WeightRounding,
    Weights,
    WeightTotals,
)
from mismatch_probe.types import MetricValue, PairArrays

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


def range_of(parts: Mapping[PartName, Part], prompts: Sequence[str], rates: Sequence[float]) -> Range:
    """What was measured on the model itself.

    Args:
        parts: By name, those that there are.
        prompts: Of each sequence that they were measured on, of which some parts took the first ones.
        rates: Learning rates.
    """
    weights, forward, backward, lag, proof = (parts.get(name) for name in PARTS)
    facts = {} if proof is None else {name: value for name, value in proof[0].items() if name != "made_with"}
    return Range(
        weights=None if weights is None else _weights(weights[0]["rows"]),
        forward=None if forward is None else _activations(*forward, prompts),
        backward=None if backward is None else _gradients(*backward, prompts),
        lag=None if lag is None else _lag(lag, backward, prompts, rates),
        proof=None if proof is None else Fp16Pass.model_validate(facts),
    )


def _activations(facts: Mapping[str, Any], arrays: Arrays, prompts: Sequence[str]) -> Activations:
    """Peaks by tensor, by kind of tensor, by layer of the residual stream, and by context length.

    Args:
        facts, arrays: The part.
        prompts: Of each sequence that ran.
    """
    places = facts["places"]
    sums = PeakSums.of_arrays(tuple(place["name"] for place in places), dict(arrays))
    median, p99, p999 = (sums.quantile(level) for level in (0.5, 0.99, 0.999))
    rows = [
        Peak(
            name=place["name"],
            kind=place["kind"],
            layer=place["layer"],
            peak=float(sums.largest[i]),
            first_token_peak=float(sums.first[i]),
            rest_peak=float(sums.rest[i]),
            rest_median=float(median[i]),
            rest_p99=float(p99[i]),
            rest_p999=float(p999[i]),
            n_overflow=int(sums.n_overflow[i]),
            n_nonfinite=int(sums.n_nonfinite[i]),
            sequence=int(sums.at[i, 0]),
            position=int(sums.at[i, 1]) if place["placed"] else None,
        )
        for i, place in enumerate(places)
    ]
    # Fused attention keeps its products in FP32; eager attention makes them in the dtype like everything else.
    apart = FUSED if facts["fused"] else ()
    held = [row for row in rows if row.kind not in apart]
    residual = [i for i, place in enumerate(places) if place["kind"] == "residual"]
    context = sums.by_context[[i for i, row in enumerate(rows) if row.kind not in apart]].max(axis=0)
    hits = np.bincount(_index(prompts), weights=sums.overflow_by_sequence).astype(np.float64)
    counts = np.bincount(_index(prompts), weights=sums.lengths).astype(np.float64)
    # Without any hit tokens of a prompt are not known to be independent: the prompt is the unit (judge.py).
    rate = unseen_rate(len(counts))
    if hits.any():
        rate = MetricValue(float(hits.sum() / counts.sum()), *rare_share_interval(hits, counts))
    largest = max(held, key=lambda row: row.peak)
    return Activations(
        n_sequences=len(sums.lengths),
        n_prompts=len(set(prompts)),
        n_tokens=sum(sums.lengths),
        longest=sums.longest,
        fused_attention=facts["fused"],
        overflow_rate=rate,
        n_overflow=int(hits.sum()),
        n_overflow_prompts=int(np.count_nonzero(hits)),
        largest=largest,
        # What is less than a bit smaller and came earlier is where the largest comes from.
        source=next(row.name for row in held if row.peak >= largest.peak / 2),
        first_overflow=next((row.name for row in held if row.n_overflow), None),
        first_nonfinite=next((row.name for row in rows if row.n_nonfinite), None),
        kinds={kind: _largest(rows, kind) for kind in KINDS if any(row.kind == kind for row in rows)},
        residual_by_layer=tuple(_layer(rows, index) for index in range(len(facts["layers"]))),
        by_context=tuple(
            ContextPeaks(first=context_of(i)[0], last=context_of(i)[1], peak=float(context[i]), residual=float(top))
            for i, top in enumerate(sums.by_context[residual].max(axis=0) if residual else context)
            if context_of(i)[0] < sums.longest
        ),
        tensors=tuple(rows),
    )


def _weights(facts: Sequence[Mapping[str, Any]]) -> Weights:
    """Conversion of weights."""
    rows = tuple(WeightRounding.model_validate(row) for row in facts)
    return Weights(float16=_total(rows, "float16"), bfloat16=_total(rows, "bfloat16"), tensors=rows)


def _total(every: Sequence[WeightRounding], dtype: str) -> WeightTotals:
    rows = [row for row in every if row.dtype == dtype]
    return WeightTotals(
        # Of vectors, a bias near 0 may vanish without a trace, so that a matrix is what can be bad.
        worst=max(rows, key=lambda row: (row.n_nonfinite + row.n_overflow > 0, row.ndim > 1, row.error)),
        n_nonfinite=sum(row.n_nonfinite for row in rows),
        n_overflow=sum(row.n_overflow for row in rows),
        n_flushed=sum(row.n_flushed for row in rows),
        n_subnormal=sum(row.n_subnormal for row in rows),
        n=sum(row.n for row in rows),
    )


def _gradients(facts: Mapping[str, Any], arrays: Arrays, prompts: Sequence[str]) -> Gradients:
    """Gradients by tensor, what FP16 flushes of them without a loss scale, and the loss scales that serve them all.

    Args:
        facts, arrays: The part.
        prompts: Of each sequence of the calibration, of which the first ones were taken.
    """
    histograms = histograms_of(facts, arrays)
    total = sum(float(h.mass[:-1].sum()) for h in histograms.values())
    lost = sum(float(h.mass[:-1].sum()) * h.flushed_share(0) for h in histograms.values())
    largest = [float(value) for value in arrays["largest_by_sequence"] if np.isfinite(value)]
    n_sequences = len(arrays["largest_by_sequence"])
    return Gradients(
        step_tokens=facts["step_tokens"],
        n_sequences=n_sequences,
        n_prompts=len(set(prompts[:n_sequences])),
        n_tokens=facts["n_tokens"],
        largest=max((h.largest for h in histograms.values()), default=0.0),
        flushed_unscaled=lost / total if total else 0.0,
        scales=scale_range(histograms, flushed=_FLUSHED),
        flushed_allowed=_FLUSHED,
        start_exponent=FIRST_SCALE,
        overflow_at_start=_first_over(histograms, FIRST_SCALE),
        scaler=simulate_scaler(largest) if any(largest) else None,
        mass_by_exponent={
            side: _by_exponent(
                [h for name, h in histograms.items() if name.endswith(" (activation)") == (side != "weight")]
            )
            for side in ("weight", "activation")
        },
        tensors=tuple(_gradient(name, h) for name, h in histograms.items()),
    )


def _gradient(name: str, histogram: ExponentHistogram) -> GradientTensor:
    own = scale_range({name: histogram}, flushed=_FLUSHED)
    return GradientTensor(
        name=name,
        largest=histogram.largest,
        n_nonfinite=histogram.n_nonfinite,
        flushed_unscaled=histogram.flushed_share(0),
        scale_low=None if own is None else own.low,
        scale_high=None if own is None else own.high,
    )


def _lag(lag: Part, backward: Part | None, calibration: Sequence[str], rates: Sequence[float]) -> Lag:
    """How far the engine lags behind the masters.

    Args:
        lag, backward: The parts; without the second one there is no motion.
        calibration: Prompt of each sequence, of which the first ones were scored.
        rates: Learning rates.
    """
    facts, arrays = lag
    sequence = np.asarray(arrays["sequence"], np.int64)
    prompts = calibration[: int(sequence.max()) + 1]
    cases = []
    for case in facts["cases"]:
        masters, engine = arrays[f"masters-{case['name']}"], arrays[f"engine-{case['name']}"]
        prompt, names = _index(prompts), tuple(dict.fromkeys(prompts))
        position = np.arange(len(sequence)) - np.searchsorted(sequence, sequence)
        pair = PairArrays(engine, masters, sequence, position, prompt, names, False, "both sides are the trainer's")
        cases.append(LagCase.model_validate({**case, **compute_metrics(pair, keys=_GAP)}))
    motion = None if backward is None else _motion(backward, rates)
    return Lag(cases=tuple(cases), n_sequences=len(prompts), batch=LAG_BATCH, motion=motion)


def _motion(backward: Part, rates: Sequence[float]) -> Motion:
    facts, arrays = backward
    layers = [layer_of(name) for name in facts["tensors"]]
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
                WeightMotion(
                    dtype=form.name,
                    rate=rate,
                    first_ulp=_of(np.mean, first),
                    first_reached=_of(np.mean, first > 0.5),
                    steady_ulp=_of(np.mean, steady),
                    steady_ulp_median=_of(np.median, steady),
                    # Always pushed one way a weight moves by the learning rate, and has half a unit to go: exactly so
                    # from the grid, on average from anywhere between.
                    straight_steps=_of(np.median, np.maximum(0.5 * ulp / rate, 1.0)),
                    walk_steps=_median_step(walk),
                    walk_steps_generic=_median_step(generic),
                    walk_reached=_of(np.mean, walk > 0),
                    walk_reached_generic=_of(np.mean, generic > 0),
                    by_layer=tuple(
                        LayerMotion(layer=int(i), steady_ulp=float(steady[layer[alive] == i].mean()))
                        for i in np.unique(layer[alive])
                        if i >= 0
                    ),
                )
            )
    return Motion(
        steps=motion.steps,
        betas=BETAS,
        n_weights=int(alive.sum()),
        n_without_gradient=int((~alive).sum()),
        rows=tuple(rows),
    )


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


def _largest(rows: Sequence[Peak], kind: str) -> KindPeak:
    """Of a kind of tensor, the one with the largest peak."""
    top = max((row for row in rows if row.kind == kind), key=lambda row: row.peak)
    over = tuple(name for name, form in FORMATS.items() if top.peak >= form.overflows_from or top.n_nonfinite)
    return KindPeak(**dict(top), overflows_in=over)


def _layer(rows: Sequence[Peak], index: int) -> LayerPeaks:
    found = [row for row in rows if row.kind == "residual" and row.layer == index]
    keys = ("first_token_peak", "rest_peak", "rest_median", "rest_p999")
    return LayerPeaks(layer=index, **{key: max((getattr(row, key) for row in found), default=0.0) for key in keys})


def _by_exponent(histograms: Sequence[ExponentHistogram]) -> tuple[tuple[int, float], ...]:
    """Exponent and Σ|g| of the bins that hold anything."""
    if not histograms:
        return ()
    mass = np.sum([h.mass for h in histograms], axis=0)
    return tuple((int(i) - 127, float(mass[i])) for i in np.flatnonzero(mass[:-1]))


def _first_over(histograms: Mapping[str, ExponentHistogram], exponent: int) -> str | None:
    """The first tensor, in the order of the backward pass, that a loss scale of 2^exponent overflows."""
    return next((name for name, h in histograms.items() if h.overflows(exponent)), None)
