"""From the tables of a comparison and the projected gradients of its sequences to what `rl gradient` reports.

Shape legend: `S` sequences of a rollout pass, `n` of them that count, `K` components of a projection, `R` draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from mismatch_probe.engines.gradient import DIRECTIONS, PassTask, PassVectors, SequenceTask
from mismatch_probe.metrics.gradient import GRADIENT_KEYS, Weighted, gradient_metrics, random_walk_ess, sign_draws
from mismatch_probe.metrics.intervals import UPPER_TAIL, Floats
from mismatch_probe.metrics.length_prediction import forecast_pair
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.passes import PassId
from mismatch_probe.probes.gradient.plan import PassData, reference_of
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.gradient import (
    CentralRange,
    Draws,
    Gradient,
    GradientEstimate,
    LengthEss,
    MissingPass,
    PairEss,
    Reference,
    RolloutGradient,
)
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue, PairArrays

# 1 − cosine² is the part of an estimate's mean square that lies off the reference. Below this part it agrees.
NEGLIGIBLE_TURN = 0.01
Agreement = Literal["gradient-turned", "gradient-undecided", "gradient-agrees"]
_SEVERITIES: dict[Agreement, Severity] = {
    "gradient-turned": "warn",
    "gradient-undecided": "note",
    "gradient-agrees": "info",
}
HALF = 0.5
DRAWS = 400
_PAIR_KEYS = ("mean_abs_logprob_diff", "ess_seq", "ess_seq_gaussian")
_COLUMNS = (
    *("rollout_pass", "rollout_dtype", "n_sequences", "n_tokens", "correction", "trainer_pass", "metric"),
    *("value", "ci_low", "ci_high", "why", "draws_low", "draws_high"),
)


def agreement(cosine: MetricValue) -> Agreement:
    """Whether the estimate without weights agrees with the reference, by the limits of its cosine."""
    low, high = ((abs(limit) * limit if limit is not None else None) for limit in (cosine.ci_low, cosine.ci_high))
    if high is not None and high < 1 - NEGLIGIBLE_TURN:
        return "gradient-turned"
    return "gradient-agrees" if low is not None and low >= 1 - NEGLIGIBLE_TURN else "gradient-undecided"


def findings_of(passes: Sequence[RolloutGradient], missing: Sequence[MissingPass]) -> Iterator[Finding]:
    """Every rollout dtype is in one of three findings; corrections are judged where the gradient is turned."""
    plain = {found.rollout_dtype: found.estimates[0].metrics.cosine for found in passes}
    for code, severity in _SEVERITIES.items():
        cosines = {dtype: cosine for dtype, cosine in plain.items() if agreement(cosine) == code}
        if cosines:
            yield Finding(code=code, severity=severity, values={"cosine": cosines, "negligible": NEGLIGIBLE_TURN})
    for found in passes:
        if agreement(plain[found.rollout_dtype]) == "gradient-turned":
            yield _corrections(found)
    for found in passes:
        counts = {"empty": found.n_empty, "nonfinite": found.n_nonfinite, "impossible": found.n_impossible}
        if any(counts.values()):
            values: dict[str, Value] = {"dtype": found.rollout_dtype, "kept": found.n_sequences, **counts}
            yield Finding(code="gradient-sequences-left-out", severity="note", where=found.rollout_pass, values=values)
    for one in missing:
        yield Finding(code="gradient-pass-missing", severity="note", where=one.rollout_pass, values={"why": one.why})
    yield from _limits(passes)


def _corrections(found: RolloutGradient) -> Finding:
    """Whether one of the corrections that training in this dtype can have comes closer than none, by the intervals."""
    plain, *others = (estimate for estimate in found.estimates if found.own(estimate))
    known = [estimate for estimate in others if _place(estimate) is not None]
    best = max(known, key=lambda estimate: _place(estimate) or (0.0, 0.0), default=None)
    equal = tuple(estimate.correction for estimate in known if best and _place(estimate) == _place(best))
    values: dict[str, Value] = {"dtype": found.rollout_dtype, "corrections": equal}
    if best is None:
        values |= {"cosine": MetricValue(None, why="no correction has one")}
        return Finding(code="gradient-no-closer", severity="note", where=found.rollout_pass, values=values)
    low, high = best.metrics.cosine.ci_low, plain.metrics.cosine.ci_high
    values |= {"cosine": best.metrics.cosine}
    if low is None or high is None or low <= high:
        return Finding(code="gradient-no-closer", severity="note", where=found.rollout_pass, values=values)
    values |= {
        "algorithm": f"pg-{equal[0]}",
        "effective_batch": best.metrics.effective_batch,
    }
    return Finding(code="gradient-closest-correction", severity="info", where=found.rollout_pass, values=values)


def _place(estimate: GradientEstimate) -> tuple[float, float] | None:
    """Closer to the reference is better, then a larger effective batch; None where either has no value."""
    cosine, batch = estimate.metrics.cosine.value, estimate.metrics.effective_batch.value
    return None if cosine is None or batch is None else (cosine, batch)


def _limits(passes: Sequence[RolloutGradient]) -> Iterator[Finding]:
    """Each reason once, with the dtypes that it holds for."""
    dtypes: dict[str, dict[str, None]] = {}
    for found in passes:
        for estimate in found.estimates:
            for key in GRADIENT_KEYS:
                value: MetricValue = getattr(estimate.metrics, key)
                for why in filter(None, value.why.split("; ")):
                    dtypes.setdefault(why, {})[found.rollout_dtype] = None
    for why, names in sorted(dtypes.items()):
        yield Finding(code="gradient-limited", severity="note", values={"why": why, "dtypes": tuple(names)})


def document_of(
    run: RunDirectory,
    data: Mapping[str, PassData],
    vectors: Mapping[str, PassVectors],
    tasks: Mapping[str, PassTask],
    missing: Mapping[str, str],
    lengths: Sequence[int],
) -> Gradient:
    """The content of `gradient.json`.

    Args:
        run: The comparison.
        data: By rollout pass.
        vectors: The gradients of the sequences that count, by rollout pass.
        tasks: What the worker was asked, by rollout pass.
        missing: Rollout passes that are left out, with the reason.
        lengths: Response lengths at which ESS is predicted.
    """
    config = run.manifest.config
    passes = tuple(_pass(found, vectors[name], tasks[name], lengths, config.seed) for name, found in data.items())
    left_out = tuple(MissingPass(rollout_pass=name, why=why) for name, why in missing.items())
    return Gradient(
        **Gradient.stamp(),
        model=run.manifest.model.name,
        config=config,
        directions=DIRECTIONS,
        reference=Reference(correction="seq-is", trainer_pass=str(reference_of(run))),
        passes=passes,
        missing=left_out,
        findings=tuple(findings_of(passes, left_out)),
    )


def _pass(data: PassData, vectors: PassVectors, task: PassTask, lengths: Sequence[int], seed: int) -> RolloutGradient:
    first = next(iter(data.pairs.values()))
    return RolloutGradient(
        rollout_pass=str(data.rollout),
        rollout_dtype=data.rollout.dtype,
        n_sequences=len(data.kept),
        n_prompts=len(np.unique(first.prompt[data.kept])),
        n_tokens=sum(row.stop - row.start for row in data.rows),
        n_empty=data.n_empty,
        n_nonfinite=data.n_nonfinite,
        n_impossible=data.n_impossible,
        logprob_gap=vectors.logprob_gap,
        pairs=tuple(_pair(trainer, pair, lengths, seed) for trainer, pair in data.pairs.items()),
        estimates=tuple(_estimates(data, vectors, task.sequences, seed)),
    )


def _pair(trainer: PassId, pair: PairArrays, lengths: Sequence[int], seed: int) -> PairEss:
    """ESS as measured and as predicted."""
    found = compute_metrics(pair, keys=_PAIR_KEYS, seed=seed)
    mean_length = len(pair.sequence) / max(1, len(np.unique(pair.sequence)))
    walk = random_walk_ess(pair, {"": mean_length, **{str(length): length for length in lengths}}, seed=seed)
    forecast = forecast_pair([pair], lengths=lengths, seed=seed)
    return PairEss(
        trainer_pass=str(trainer),
        trainer_dtype=trainer.dtype,
        trainer_mode=trainer.mode,
        mean_length=mean_length,
        **{key: found[key] for key in _PAIR_KEYS},
        ess_random_walk=walk[""],
        lengths=tuple(
            LengthEss(
                length=prediction.length,
                ess_random_walk=walk[str(prediction.length)],
                ess_seq=prediction.values["ess_seq"],
            )
            for prediction in forecast.predictions
        ),
        half_length=forecast.crossings[HALF],
    )


def _estimates(
    data: PassData, vectors: PassVectors, tasks: Sequence[SequenceTask], seed: int
) -> Iterator[GradientEstimate]:
    """Every correction with every trainer's log-probs, the one without weights first."""
    plain = vectors.score.astype(np.float64)
    reference = vectors.weighted(("seq-is", str(data.reference))).vectors
    _, prompt = np.unique(next(iter(data.pairs.values())).prompt[data.kept], return_inverse=True)
    signs = _signs(tasks)
    n = len(plain)
    weightings: list[tuple[str, PassId | None, Weighted]] = [
        ("none", None, Weighted(plain, np.ones(n), np.zeros(n), np.zeros(n))),
        *(
            (correction, trainer, vectors.weighted((correction, str(trainer))))
            for trainer in data.pairs
            for correction in dict.fromkeys(name for name, _ in vectors.sums)
        ),
    ]
    for correction, trainer, weighted in weightings:
        cosines, norms = sign_draws(weighted.vectors, reference, signs)
        yield GradientEstimate(
            correction=correction,
            trainer_pass=str(trainer) if trainer else None,
            trainer_dtype=trainer.dtype if trainer else None,
            trainer_mode=trainer.mode if trainer else None,
            metrics=gradient_metrics(weighted, plain, reference, prompt.astype(np.int64), seed=seed),
            draws=Draws(cosine=_central(cosines), norm_ratio=_central(norms)),
        )


def _signs(tasks: Sequence[SequenceTask]) -> Floats:
    """`[R, n]` advantages: those of a sequence are the same in every rollout dtype that samples it."""
    columns = []
    for task in tasks:
        ids = np.concatenate([[len(task.prompt)], task.prompt, task.response]).astype(np.int64)
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        columns.append(np.random.default_rng(int.from_bytes(digest, "little")).integers(0, 2, DRAWS) * 2.0 - 1)
    return np.stack(columns, axis=1)


def _central(values: Floats) -> CentralRange | None:
    """The central 95 % of draws; None where one is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, (1 - UPPER_TAIL, UPPER_TAIL))
    return float(low), float(high)


def frame_of(document: Gradient) -> pd.DataFrame:
    """A row per rollout pass, correction, trainer and metric: what `gradient.csv` holds."""
    return pd.DataFrame(list(_rows(document)), columns=_COLUMNS)


def _rows(document: Gradient) -> Iterator[tuple[object, ...]]:
    for found in document.passes:
        about = found.rollout_pass, found.rollout_dtype, found.n_sequences, found.n_tokens
        for estimate in found.estimates:
            draws = {"cosine": estimate.draws.cosine, "norm_ratio": estimate.draws.norm_ratio}
            for key in GRADIENT_KEYS:
                value: MetricValue = getattr(estimate.metrics, key)
                numbers = value.value, value.ci_low, value.ci_high, value.why
                limits = draws.get(key) or (None, None)
                yield *about, estimate.correction, estimate.trainer_pass, key, *numbers, *limits
