"""From the tables of a comparison and the projected gradients of its sequences to what `rl gradient` reports.

Shape legend: `S` sequences of a rollout pass, `n` of them that count, `K` components of a projection, `R` draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mismatch_probe.config import CompareConfig
from mismatch_probe.metrics.chunks import Ints, usable_rows
from mismatch_probe.metrics.gradient import GRADIENT_KEYS, Weighted, gradient_metrics, random_walk_ess, sign_draws
from mismatch_probe.metrics.intervals import UPPER_TAIL, Floats
from mismatch_probe.metrics.length_prediction import forecast_pair
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.planning import RolloutPass, TrainerPass
from mismatch_probe.rl.gradient_job import DIRECTIONS, PassVectors, SequenceTask
from mismatch_probe.tables import RunDirectory
from mismatch_probe.types import PairArrays

SCHEMA_VERSION = 1
CONSISTENT = TrainerPass("float32", "cast")
HALF = 0.5
DRAWS = 400
_PAIR_KEYS = ("mean_abs_logprob_diff", "ess_seq", "ess_seq_gaussian")
ADVANTAGES = "+1 or −1 at random, one a sequence, seeded by its ids"


@dataclass(frozen=True)
class PassData:
    """A rollout pass with the trainers whose log-probs make weights.

    Attributes:
        rollout: The pass.
        pairs: Its pairs: the trainer of its own dtype where there is one, and the trainer in FP32, the last.
        kept: `[n]` indices of the sequences that have tokens, all of them usable in every pair.
        rows: `[n]` their tokens, as slices of the pairs.
        n_empty: Sequences without tokens.
        n_nonfinite: Sequences with a token that is not finite.
        n_impossible: Others with a token that is not usable.
    """

    rollout: RolloutPass
    pairs: Mapping[TrainerPass, PairArrays]
    kept: Ints
    rows: Sequence[slice]
    n_empty: int
    n_nonfinite: int
    n_impossible: int

    @classmethod
    def of(cls, rollout: RolloutPass, pairs: Mapping[TrainerPass, PairArrays]) -> PassData:
        first = next(iter(pairs.values()))
        usable = np.logical_and.reduce([usable_rows(pair) for pair in pairs.values()])
        sides = np.stack([side for pair in pairs.values() for side in (pair.rollout_logprob, pair.trainer_logprob)])
        finite = np.asarray(np.isfinite(sides).all(axis=0))
        starts = np.flatnonzero(np.diff(first.sequence, prepend=-1)).tolist()
        every = [slice(*ends) for ends in zip(starts, [*starts, len(first.sequence)][1:], strict=True)]
        rows = [row for row in every if usable[row].all()]
        n_finite = sum(bool(finite[row].all()) for row in every)
        kept = np.array([first.sequence[row.start] for row in rows], dtype=np.int64)
        n_empty = len(first.prompt) - len(every)
        return cls(rollout, pairs, kept, rows, n_empty, len(every) - n_finite, n_finite - len(rows))


def document_of(
    run: RunDirectory,
    data: Mapping[str, PassData],
    vectors: Mapping[str, PassVectors],
    tasks: Mapping[str, Sequence[SequenceTask]],
    missing: Mapping[str, str],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """The content of `gradient.json`.

    Args:
        run: The comparison.
        data: By rollout pass.
        vectors: The gradients of the sequences that count, by rollout pass.
        tasks: Those sequences.
        missing: Rollout passes that are left out, with the reason.
        lengths: Response lengths at which ESS is predicted.
    """
    seed = CompareConfig.from_dict(run.manifest["config"]).seed
    return {
        "schema_version": SCHEMA_VERSION,
        "model": run.manifest["model"]["name"],
        "directions": DIRECTIONS,
        "advantages": ADVANTAGES,
        "consistent": {"correction": "seq-is", "trainer_pass": CONSISTENT.pass_id},
        "passes": [
            {
                "rollout_pass": name,
                "rollout_dtype": found.rollout.dtype,
                "n_sequences": len(found.kept),
                "n_prompts": len(np.unique(next(iter(found.pairs.values())).prompt[found.kept])),
                "n_tokens": sum(row.stop - row.start for row in found.rows),
                "n_empty": found.n_empty,
                "n_nonfinite": found.n_nonfinite,
                "n_impossible": found.n_impossible,
                "logprob_gap": vectors[name].logprob_gap,
                "pairs": [_pair(trainer, pair, lengths, seed) for trainer, pair in found.pairs.items()],
                "arms": _arms(found, vectors[name], tasks[name], seed),
            }
            for name, found in data.items()
        ],
        "missing": [{"rollout_pass": name, "why": why} for name, why in missing.items()],
    }


def _pair(trainer: TrainerPass, pair: PairArrays, lengths: Sequence[int], seed: int) -> dict[str, Any]:
    """ESS as measured and as predicted."""
    found = compute_metrics(pair, keys=_PAIR_KEYS, seed=seed)
    mean_length = len(pair.sequence) / max(1, len(np.unique(pair.sequence)))
    walk = random_walk_ess(pair, {"": mean_length, **{str(length): length for length in lengths}}, seed=seed)
    forecast = forecast_pair([pair], lengths=lengths, seed=seed)
    return {
        **_named(trainer),
        "mean_length": mean_length,
        "metrics": {key: value.as_dict() for key, value in found.items()} | {"ess_random_walk": walk[""].as_dict()},
        "lengths": [
            {
                "length": prediction.length,
                "ess_random_walk": walk[str(prediction.length)].as_dict(),
                "ess_seq": prediction.values["ess_seq"].as_dict(),
            }
            for prediction in forecast.predictions
        ],
        "half_length": forecast.crossings[HALF].as_dict(),
    }


def _named(trainer: TrainerPass | None) -> dict[str, Any]:
    if trainer is None:
        return {"trainer_pass": None, "trainer_dtype": None, "trainer_mode": None}
    return {"trainer_pass": trainer.pass_id, "trainer_dtype": trainer.dtype, "trainer_mode": trainer.mode}


def _arms(data: PassData, vectors: PassVectors, tasks: Sequence[SequenceTask], seed: int) -> list[dict[str, Any]]:
    """Every correction with every trainer's log-probs, the one without weights first."""
    plain = vectors.score.astype(np.float64)
    consistent = vectors.weighted(("seq-is", CONSISTENT.pass_id)).vectors
    _, prompt = np.unique(next(iter(data.pairs.values())).prompt[data.kept], return_inverse=True)
    signs = _signs(tasks)
    n = len(plain)
    unweighted = Weighted(plain, np.ones(n), np.zeros(n), np.zeros(n))
    arms: list[tuple[str, TrainerPass | None, Weighted]] = [("none", None, unweighted)]
    arms += [
        (correction, trainer, vectors.weighted((correction, trainer.pass_id)))
        for trainer in data.pairs
        for correction in dict.fromkeys(name for name, _ in vectors.sums)
    ]
    found = []
    for correction, trainer, weighted in arms:
        values = gradient_metrics(weighted, plain, consistent, prompt.astype(np.int64), seed=seed)
        draws = sign_draws(weighted.vectors, consistent, signs)
        found.append(
            {
                "correction": correction,
                **_named(trainer),
                "metrics": {key: value.as_dict() for key, value in values.items()},
                "draws": dict(zip(("cosine", "norm_ratio"), map(_central, draws), strict=True)),
            }
        )
    return found


def _signs(tasks: Sequence[SequenceTask]) -> Floats:
    """`[R, n]` advantages: those of a sequence are the same in every rollout dtype that samples it."""
    columns = []
    for task in tasks:
        ids = np.concatenate([[len(task.prompt)], task.prompt, task.response]).astype(np.int64)
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        columns.append(np.random.default_rng(int.from_bytes(digest, "little")).integers(0, 2, DRAWS) * 2.0 - 1)
    return np.stack(columns, axis=1)


def _central(values: Floats) -> list[float] | None:
    """The central 95 % of draws; None where one is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, (1 - UPPER_TAIL, UPPER_TAIL))
    return [float(low), float(high)]


def frame_of(document: Mapping[str, Any]) -> pd.DataFrame:
    """A row per rollout pass, correction, trainer and metric: what `gradient.csv` holds."""
    rows = [
        {
            "rollout_pass": found["rollout_pass"],
            "rollout_dtype": found["rollout_dtype"],
            "n_sequences": found["n_sequences"],
            "n_tokens": found["n_tokens"],
            "correction": arm["correction"],
            "trainer_pass": arm["trainer_pass"],
            "metric": key,
            **arm["metrics"][key],
            **dict(zip(("draws_low", "draws_high"), arm["draws"].get(key) or (None, None), strict=True)),
        }
        for found in document["passes"]
        for arm in found["arms"]
        for key in GRADIENT_KEYS
    ]
    columns = ["rollout_pass", "rollout_dtype", "n_sequences", "n_tokens", "correction", "trainer_pass", "metric"]
    return pd.DataFrame(rows, columns=[*columns, "value", "ci_low", "ci_high", "why", "draws_low", "draws_high"])
