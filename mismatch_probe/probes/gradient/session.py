"""What the mismatch does to the policy gradient of a batch, without an RL run: from the tables of a comparison.

The comparison has the rollouts and everybody's log-probs of them; one more pass, of the trainer in FP32, adds the
gradients of each sequence. All of a rollout dtype's estimates are made of the same sequences and the same scores in
FP32, so that they differ in their weights alone: what a 16-bit backward pass rounds away is not in here.

Imports no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mismatch_probe.config import CompareConfig
from mismatch_probe.engines.gradient import GradientJob, PassTask, PassVectors
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.files import write_text
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.probes.comparison import KEPT, begun, run_passes, write_run
from mismatch_probe.probes.gradient.plan import FOLDER, pass_data, task_of
from mismatch_probe.probes.gradient.result import document_of, frame_of
from mismatch_probe.probes.own_pass import device_of, fp32_trainer, model_of, run_pass
from mismatch_probe.probes.planning import Plan, make_plan
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session, write_pages
from mismatch_probe.results.gradient import Gradient
from mismatch_probe.runs.comparison import RunDirectory

# Of a weight in FP32, its gradient, and its place in the projection (`engines.gradient.Sketch`).
_BYTES_PER_WEIGHT = 4 + 4 + 2


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


def new_gradient(
    config: CompareConfig, out: str | Path | None, predict_lengths: Sequence[int], progress: Progress | None
) -> GradientResult:
    """Compares, makes the gradients, and computes.

    Raises:
        UsageError: No FP32 trainer is asked for.
        ProbeError: What a comparison raises, and what its gradients do.
    """
    if "float32" not in config.trainer_dtypes:
        raise UsageError("The gradient needs an FP32 trainer pass.", "Add float32 to --trainer-dtypes.")
    plan = make_plan(config, progress, out)
    with begun(plan, out, progress) as session:
        return _measure(session, predict_lengths, plan)


def resume_gradient(
    path: Path, predict_lengths: Sequence[int], progress: Progress | None, *, passes: bool
) -> GradientResult:
    """Makes the gradients that are missing of a run, and computes.

    Args:
        path: The folder of a comparison.
        predict_lengths: Response lengths at which ESS is predicted.
        progress: Told about every pass.
        passes: Whether to run the missing passes of the comparison first.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
        ProbeError: The run has no log-probs of an FP32 trainer, its model has changed, or an engine failed.
    """
    with Session.resume(RunDirectory, path, progress) as session:
        return _measure(session, predict_lengths, passes=passes)


def _measure(
    session: Session[RunDirectory], predict_lengths: Sequence[int], plan: Plan | None = None, *, passes: bool = True
) -> GradientResult:
    run, progress = session.run, session.progress
    with session.stoppable(KEPT, f"mismatch-probe rl gradient --resume {run.path}"):
        if passes and not session.complete:
            run_passes(session, plan)
            progress.message("computing metrics and figures")
            write_run(analyse(run))
        data, missing = pass_data(run)
        config = run.manifest.config
        tasks = [task_of(run, config, found) for found in data.values()]
        _make_missing(run, config, tasks, progress)
    progress.message("computing metrics and figure")
    vectors = {}
    for name, task in zip(data, tasks, strict=True):
        loaded = PassVectors.load(task)
        if loaded is None:
            raise TableError(f"{task.file.path} cannot be read.", "Run the command again to make it.")
        vectors[name] = loaded
    lengths = tuple(predict_lengths or config.predict_lengths or (run.manifest.sizes.max_tokens,))
    document = document_of(run, data, vectors, dict(zip(data, tasks, strict=True)), missing, lengths)
    return GradientResult(run.path, document, _write(run.path / FOLDER, document))


def _make_missing(run: RunDirectory, config: CompareConfig, tasks: Sequence[PassTask], progress: Progress) -> None:
    """Makes the files that are not there yet."""
    missing = [task for task in tasks if PassVectors.load(task) is None]
    if not missing:
        return
    device = device_of(run)
    trainer = fp32_trainer(config, model_of(run, config, progress, _BYTES_PER_WEIGHT), device)
    run_pass(run, GradientJob(trainer, missing), trainer, FOLDER, "gradients", progress)


def _write(folder: Path, document: Gradient) -> dict[str, Path]:
    from mismatch_probe.report.gradient import gradient_report

    document.write(folder / "gradient.json")
    write_text(folder / "gradient.csv", frame_of(document).to_csv(index=False, lineterminator="\n"))
    return write_pages(document, gradient_report, folder, figures=folder)
