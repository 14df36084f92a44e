"""The engine part of an audit: which measurements are missing in a run, and the process that makes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from mismatch_probe.config import AuditOptions
from mismatch_probe.engines import registry
from mismatch_probe.engines.audit.job import AuditJob, histograms_of
from mismatch_probe.engines.base import TrainerJob
from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.floats import scale_range
from mismatch_probe.metrics.length_prediction import FURTHEST
from mismatch_probe.probes.own_pass import device_of, fp32_trainer, model_of, run_pass
from mismatch_probe.probes.progress import Progress
from mismatch_probe.results.ranges import PARTS, PartName
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.measurements import Measurement, Part, Store
from mismatch_probe.types import ScoreRequest

FOLDER = "audit"
N_GRADIENTS, N_LAG, N_PROOF = 16, 32, 4
_BYTES_PER_WEIGHT = 4 + 4  # in FP32, with its gradient


@dataclass(frozen=True)
class Calibration:
    """The sequences that the model's own numbers are taken on.

    Attributes:
        sequences: Of one rollout pass, first one of every prompt, then the next of every prompt.
        prompts: Name of each one's prompt.
    """

    sequences: tuple[ScoreRequest, ...]
    prompts: tuple[str, ...]


def calibration_of(run: RunDirectory) -> Calibration:
    """The sequences of the run's most precise rollout pass; none where no rollout pass has any with a prompt."""
    passes = run.passes
    for rollout in sorted(passes.rollouts, key=lambda rollout: rollout.dtype != "float32"):
        name = str(rollout)
        if not run.finished(name):
            continue
        rows = [row for row in run.sequences(name).to_pylist() if row["response_token_ids"] and row["prompt_token_ids"]]
        rows.sort(key=lambda row: (row["sample_id"], row["sequence_id"]))
        if rows:
            return Calibration(
                tuple(ScoreRequest(i, r["prompt_token_ids"], r["response_token_ids"]) for i, r in enumerate(rows)),
                tuple(str(row["prompt_id"]) for row in rows),
            )
    return Calibration((), ())


class Measurements:
    """The parts of an audit in a run's folder.

    Args:
        run: The comparison.
        options: The audit's.
    """

    def __init__(self, run: RunDirectory, options: AuditOptions) -> None:
        self._run, self._options = run, options
        self._config = run.manifest.config
        self.calibration = calibration_of(run)
        self._device = device_of(run)
        self._files = Store(run.path / FOLDER, self._key)

    def load(self) -> dict[PartName, Part]:
        """The parts that are there and were made of this run with these options."""
        found = self._files.load(PARTS)
        return {name: found[name] for name in PARTS if name in found}

    def stale(self) -> tuple[PartName, ...]:
        """Parts whose file was made with other settings or by another release, or is damaged."""
        found = self._files.stale(PARTS)
        return tuple(name for name in PARTS if name in found)

    def make_missing(self, progress: Progress) -> None:
        """Makes the parts that are not there yet: those in FP32 in one process, the FP16 pass in another.

        Args:
            progress: Told about both.

        Raises:
            UsageError: The model has no weights, or no sequence of the run has a prompt.
            ProbeError: The engine failed; finished parts stay.
        """
        missing = self._files.missing(PARTS)
        parts = {name: self._files.at(name) for name in PARTS if name in missing}
        if not parts:
            return
        model = model_of(self._run, self._config, progress, _BYTES_PER_WEIGHT)
        if not self.calibration.sequences:
            raise UsageError("No sequence of this run has a prompt and a response to measure on.", "Use --from.")
        trainer = fp32_trainer(self._config, model, self._device)
        wide: dict[PartName, Measurement] = {name: part for name, part in parts.items() if name != "proof"}
        if wide:
            self._run_job(trainer, wide, "activations, gradients, lag", progress)
        if "proof" in parts:
            flags = registry.find(trainer.engine).trainer_settings(self._device, "float16").arguments
            half = replace(trainer, dtype="float16", mode=self._config.trainer_modes[0], flags=flags)
            self._run_job(half, {"proof": parts["proof"]}, "a pass in FP16", progress)

    def _run_job(
        self, trainer: TrainerJob, parts: Mapping[PartName, Measurement], text: str, progress: Progress
    ) -> None:
        sequences, backward = self.calibration.sequences, self._files.at("backward").load()
        scales = None if backward is None else scale_range(histograms_of(*backward))
        job = AuditJob(
            trainer,
            parts=parts,
            sequences=sequences,
            n_gradients=min(N_GRADIENTS, len(sequences)),
            n_lag=min(N_LAG, len(sequences)),
            n_proof=min(N_PROOF, len(sequences)),
            step_tokens=loss_tokens(self._options, self._run),
            rates=self._options.learning_rates,
            highest=None if scales is None else scales.high,
        )
        run_pass(self._run, job, trainer, "audit", text, progress)

    def _key(self, part: str) -> str:
        """A digest of all that a part depends on; a proof also on how the trainer runs."""
        config, options = self._config, self._options
        about: list[Any] = [version("mismatch-probe"), part, config.temperature, config.trainer_attn]
        about += [self._run.manifest.model.files]
        if part in ("backward", "proof"):
            about += [loss_tokens(options, self._run)]
        if part == "lag":
            about += [options.learning_rates]
        if part == "proof":
            about += [config.trainer_modes[0]]
        about += [] if part == "weights" else _ids(self.calibration.sequences)
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _ids(sequences: Sequence[ScoreRequest]) -> list[Any]:
    return [[list(s.prompt_token_ids), list(s.response_token_ids)] for s in sequences]


# The paper's step: 64 prompts × 8 samples in 4 minibatches.
STEP_SEQUENCES = 128


def planned_tokens(options: AuditOptions, run: RunDirectory) -> int:
    """The planned response length: as far as growth is predicted, where none was given."""
    return options.planned_tokens or FURTHEST * run.manifest.sizes.max_tokens


def loss_tokens(options: AuditOptions, run: RunDirectory) -> int:
    """Response tokens that a step's loss is averaged over."""
    return options.step_tokens or STEP_SEQUENCES * planned_tokens(options, run)
