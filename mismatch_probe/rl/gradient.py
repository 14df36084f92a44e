"""What the mismatch does to the policy gradient of a batch, without an RL run: from the tables of a comparison.

The comparison has the rollouts and everybody's log-probs of them; one more pass, of the trainer in FP32, adds the
gradients of each sequence. All of a rollout dtype's estimates are made of the same sequences and the same scores in
FP32, so that they differ in their weights alone: what a 16-bit backward pass rounds away is not in here.

Imports no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mismatch_probe.config import CompareConfig, check_lengths
from mismatch_probe.engines import devices
from mismatch_probe.engines.base import OnTrainer
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.files import locked, write_text
from mismatch_probe.metrics.frame import pair_arrays
from mismatch_probe.probes.own_pass import device_of, fp32_trainer, model_of, run_pass
from mismatch_probe.probes.pairs import PassPair, why_missing
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import new_run
from mismatch_probe.results.gradient import Gradient
from mismatch_probe.rl.gradient_table import REFERENCE, PassData, document_of, frame_of
from mismatch_probe.rl.gradient_task import DIRECTIONS, PassTask, PassVectors, SequenceTask
from mismatch_probe.runs.comparison import RunDirectory

FOLDER = "gradient"
Source = str | Path | CompareConfig


@dataclass(frozen=True)
class GradientJob(OnTrainer):
    """Makes the files of some rollout passes, one sequence at a time.

    Attributes:
        trainer: The trainer in FP32; its requests are left empty.
        passes: What to make.
    """

    passes: Sequence[PassTask]
    subject: str = field(default="The gradient pass", init=False)
    memory_advice: str = field(default="Compare with a lower --max-tokens.", init=False)

    def run(self, channel: Any) -> None:
        """Events: `identity`, `total` and `progress` in sequences."""
        from mismatch_probe.engines import devices
        from mismatch_probe.engines.hf import HfTrainer
        from mismatch_probe.rl.gradient_vectors import WeightedGradients, sequence_vectors

        engine = HfTrainer(self.trainer)
        gradients = WeightedGradients(engine.model, self.trainer.temperature)
        channel.phase("load")
        channel.send("identity", engine.identity() | devices.running())
        channel.send("total", sum(len(task.sequences) for task in self.passes))
        for task in self.passes:
            rows = []
            for sequence in task.sequences:
                rows.append(sequence_vectors(gradients, sequence))
                channel.send("progress", 1)
            PassVectors.of(rows, task).save(Path(task.path), task.key)
        channel.phase("gradients")
        engine.close()


@dataclass(frozen=True)
class GradientResult:
    """A finished measurement.

    Attributes:
        path: The run directory; everything of this lies in its folder `gradient`.
        document: The content of `gradient.json`.
        figures: The files of the figures, by name.
    """

    path: Path
    document: Gradient
    figures: Mapping[str, Path]

    def frame(self) -> pd.DataFrame:
        """A row per rollout pass, correction and metric, as in `gradient.csv`."""
        return frame_of(self.document)


def measure_gradient(
    source: Source, out: str | Path | None, predict_lengths: Sequence[int] | None, progress: Progress | None
) -> GradientResult:
    """Compares where it has to, makes the gradients that are missing, and computes.

    Raises:
        ProbeError: The run has no log-probs of an FP32 trainer, its model has changed, or an engine failed.
    """
    progress = progress or Progress()
    check_lengths(predict_lengths or ())
    if isinstance(source, CompareConfig):
        if REFERENCE.dtype not in source.trainer_dtypes:
            raise UsageError("The gradient needs an FP32 trainer pass.", "Add float32 to --trainer-dtypes.")
        path = new_run(source, out, (), progress).path
    else:
        path = Path(source)
    RunDirectory.open(path)  # before the lock, which would make the folder
    with locked(path):
        run = RunDirectory.open(path)
        data, missing = pass_data(run)
        config = run.manifest.config
        tasks = {name: _task(run, config, found) for name, found in data.items()}
        _make_missing(run, config, list(tasks.values()), progress)
        progress.message("computing metrics and figure")
        vectors = {}
        for name, task in tasks.items():
            loaded = PassVectors.load(Path(task.path), task.key)
            if loaded is None:
                raise TableError(f"{task.path} cannot be read.", "Run the command again to make it.")
            vectors[name] = loaded
        lengths = tuple(predict_lengths or config.predict_lengths or (run.manifest.sizes.max_tokens,))
        sequences = {name: task.sequences for name, task in tasks.items()}
        document = document_of(run, data, vectors, sequences, missing, lengths)
        return GradientResult(path, document, _write(run.path / FOLDER, document))


def pass_data(run: RunDirectory) -> tuple[dict[str, PassData], dict[str, str]]:
    """What the run has of each rollout pass that sampled for itself, and why it has nothing of the others.

    Raises:
        UsageError: The run has no log-probs of a trainer in FP32.
        TableError: A table is missing or corrupt, or no rollout pass can be used.
    """
    passes = run.passes
    if REFERENCE not in passes.trainers:
        raise UsageError(
            "This run has no FP32 trainer pass; the gradient is compared with it.",
            "Run `mismatch-probe compare` again with float32 in --trainer-dtypes.",
        )
    found: dict[str, PassData] = {}
    missing: dict[str, str] = {}
    for rollout in passes.rollouts:
        name = str(rollout)
        missing[name] = why_missing(run, PassPair(rollout, REFERENCE))
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
        trainers = dict.fromkeys([*own[:1], REFERENCE])
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


def _task(run: RunDirectory, config: CompareConfig, data: PassData) -> PassTask:
    """The worker's task of a rollout pass."""
    name = str(data.rollout)
    table = run.sequences(name).sort_by("sequence_id")
    prompts, responses = (table[column].to_pylist() for column in ("prompt_token_ids", "response_token_ids"))
    sequences = [
        SequenceTask(
            prompts[index],
            responses[index],
            data.pairs[REFERENCE].position[rows],
            data.pairs[REFERENCE].rollout_logprob[rows],
            {str(trainer): pair.trainer_logprob[rows] for trainer, pair in data.pairs.items()},
        )
        for index, rows in zip(data.kept, data.rows, strict=True)
    ]
    about = [version("mismatch-probe"), DIRECTIONS, device_of(run), config.temperature, config.trainer_attn]
    digest = hashlib.sha256(json.dumps([*about, run.manifest.model.files]).encode())
    for sequence in sequences:
        digest.update(json.dumps([sequence.prompt, sequence.response, list(sequence.trainers)]).encode())
        for values in (sequence.positions, sequence.rollout, *sequence.trainers.values()):
            digest.update(np.ascontiguousarray(values).tobytes())
    return PassTask(str(run.path / FOLDER / f"{name}.npz"), digest.hexdigest(), sequences, str(REFERENCE))


def _make_missing(run: RunDirectory, config: CompareConfig, tasks: Sequence[PassTask], progress: Progress) -> None:
    """Makes the files that are not there yet."""
    missing = [task for task in tasks if PassVectors.load(Path(task.path), task.key) is None]
    if not missing:
        return
    device = device_of(run)
    job = GradientJob(fp32_trainer(config, model_of(run, config, progress), device), missing)
    settings = devices.trainer_settings(device, "float32")
    run_pass(run, job, settings, FOLDER, "gradients", f"mismatch-probe rl gradient {run.path}", progress)


def _write(folder: Path, document: Gradient) -> dict[str, Path]:
    from mismatch_probe.report.figures import draw
    from mismatch_probe.report.gradient import gradient_report
    from mismatch_probe.report.render.files import write_report

    document.write(folder / "gradient.json")
    write_text(folder / "gradient.csv", frame_of(document).to_csv(index=False, lineterminator="\n"))
    figures = draw(document, folder)
    write_report(gradient_report(document), figures, folder)
    return figures
