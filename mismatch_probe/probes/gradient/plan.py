"""What a gradient comparison takes of a finished comparison: the sequences that count, and what the worker is asked.

Shape legend: `n` sequences that count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines.gradient import DIRECTIONS, WEIGHTED, PassTask, SequenceTask
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.metrics.chunks import Ints, usable_rows
from mismatch_probe.metrics.frame import pair_arrays
from mismatch_probe.passes import PassId
from mismatch_probe.probes.own_pass import device_of
from mismatch_probe.probes.pairs import PassPair, why_missing
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.measurements import Store
from mismatch_probe.types import PairArrays

FOLDER = "gradient"


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

    rollout: PassId
    pairs: Mapping[PassId, PairArrays]
    kept: Ints
    rows: Sequence[slice]
    n_empty: int
    n_nonfinite: int
    n_impossible: int

    @property
    def reference(self) -> PassId:
        """The trainer in FP32."""
        return list(self.pairs)[-1]

    @classmethod
    def of(cls, rollout: PassId, pairs: Mapping[PassId, PairArrays]) -> PassData:
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


def reference_of(run: RunDirectory) -> PassId:
    """The trainer in FP32, whose log-probs are π."""
    return PassId.trainer(run.manifest.config.trainer_engine, "float32")


def pass_data(run: RunDirectory) -> tuple[dict[str, PassData], dict[str, str]]:
    """What the run has of each rollout pass that sampled for itself, and why it has nothing of the others.

    Raises:
        UsageError: The run has no log-probs of a trainer in FP32.
        TableError: A table is missing or corrupt, or no rollout pass can be used.
    """
    passes, reference = run.passes, reference_of(run)
    if reference not in passes.trainers:
        raise UsageError(
            "This run has no FP32 trainer pass; the gradient is compared with it.",
            "Run `mismatch-probe compare` again with float32 in --trainer-dtypes.",
        )
    found: dict[str, PassData] = {}
    missing: dict[str, str] = {}
    for rollout in passes.rollouts:
        name = str(rollout)
        missing[name] = why_missing(run, PassPair(rollout, reference))
        if run.source_of(name) != name:
            missing[name] = "it decoded the sequences of another pass, so it did not sample them"
        if missing[name]:
            continue
        own = [
            trainer
            for trainer in passes.trainers
            if PassPair(rollout, trainer).diagonal and not why_missing(run, PassPair(rollout, trainer))
        ]
        # Of several trainer modes the first one stands for the dtype.
        trainers = dict.fromkeys([*own[:1], reference])
        data = PassData.of(rollout, {trainer: pair_arrays(run, name, str(trainer)) for trainer in trainers})
        if len(data.kept):
            found[name] = data
        else:
            missing[name] = "none of its sequences has finite log-probs for all tokens"
    missing = {name: why for name, why in missing.items() if why}
    if not found:
        reasons = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in missing.items())
        raise TableError(
            f"There is no gradient to measure ({reasons}).", "Fix that, then continue the comparison with --resume."
        )
    return found, missing


def task_of(run: RunDirectory, config: CompareConfig, data: PassData) -> PassTask:
    """What the worker is asked for a rollout pass."""
    name = str(data.rollout)
    table = run.sequences(name).sort_by("sequence_id")
    prompts, responses = (table[column].to_pylist() for column in ("prompt_token_ids", "response_token_ids"))
    sequences = [
        SequenceTask(
            prompts[index],
            responses[index],
            data.pairs[data.reference].position[rows],
            data.pairs[data.reference].rollout_logprob[rows],
            {str(trainer): pair.trainer_logprob[rows] for trainer, pair in data.pairs.items()},
        )
        for index, rows in zip(data.kept, data.rows, strict=True)
    ]
    about = [version("mismatch-probe"), DIRECTIONS, device_of(run), config.temperature, config.trainer_attn]
    about += [repr(WEIGHTED)]
    digest = hashlib.sha256(json.dumps([*about, run.manifest.model.files]).encode())
    for sequence in sequences:
        digest.update(json.dumps([sequence.prompt, sequence.response, list(sequence.trainers)]).encode())
        for values in (sequence.positions, sequence.rollout, *sequence.trainers.values()):
            digest.update(np.ascontiguousarray(values).tobytes())
    return PassTask(Store(run.path / FOLDER, lambda _: digest.hexdigest()).at(name), sequences, str(data.reference))
