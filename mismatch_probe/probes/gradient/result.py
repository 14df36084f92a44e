"""From the tables of a comparison and the projected gradients of its sequences to what `rl gradient` reports.

Shape legend: `S` sequences of a rollout pass, `n` of them that count, `K` components of a projection, `R` draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from mismatch_probe.engines.gradient import DIRECTIONS, PassTask, PassVectors, SequenceTask
from mismatch_probe.metrics.gradient import GRADIENT_KEYS, Weighted, gradient_metrics, random_walk_ess, sign_draws
from mismatch_probe.metrics.intervals import UPPER_TAIL, Floats
from mismatch_probe.metrics.length_prediction import forecast_pair
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.passes import PassId
from mismatch_probe.probes.gradient.findings import findings_of
from mismatch_probe.probes.gradient.plan import PassData, reference_of
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

HALF = 0.5
DRAWS = 400
_PAIR_KEYS = ("mean_abs_logprob_diff", "ess_seq", "ess_seq_gaussian")
_COLUMNS = (
    *("rollout_pass", "rollout_dtype", "n_sequences", "n_tokens", "correction", "trainer_pass", "metric"),
    *("value", "ci_low", "ci_high", "why", "draws_low", "draws_high"),
)


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
