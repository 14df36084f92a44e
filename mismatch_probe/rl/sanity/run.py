"""A sanity set from the outside: its folder, its process, what was found. Imports no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.engines.events import Event, Identity
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session
from mismatch_probe.probes.workers import told
from mismatch_probe.report.model import Report
from mismatch_probe.results.sanity import SanitySet
from mismatch_probe.rl.config import RlConfig, SanityConfig
from mismatch_probe.rl.run import Start
from mismatch_probe.rl.sanity.records import SanityDirectory
from mismatch_probe.rl.sanity.worker import SanityJob, settings_of
from mismatch_probe.rl.tasks import read_problems
from mismatch_probe.runs.state import SET

_PASS = "sanity-set"
# What a run on the set has to share with its sampling.
_SHARED = (
    "model",
    "revision",
    "task",
    "rollout_engine",
    "rollout_dtype",
    "max_tokens",
    "temperature",
    "chat",
    "device",
)


@dataclass(frozen=True)
class SanityResult:
    """A sanity set that is finished.

    Attributes:
        path: Its folder.
        document: The content of `sanity.json`.
    """

    path: Path
    document: SanitySet

    @property
    def problems(self) -> Path:
        """The set: a file that `--problems` of `rl run` takes."""
        return self.path / SET

    def report(self) -> Report:
        """The report."""
        from mismatch_probe.report.sanity import SanityData, sanity_report

        config = SanityConfig.of(self.document.config)
        n_kept = self.document.outcome.n_kept if self.document.outcome else 0
        return sanity_report(
            SanityData(
                folder=str(self.path),
                document=self.document,
                model=config.model,
                rollout_dtype=config.rollout_dtype,
                temperature=config.temperature,
                train=tuple(_train(config, self.problems, n_kept)) if n_kept else (),
                longer=tuple(config.replace(max_tokens=2 * config.max_tokens).arguments()),
            )
        )


def _train(config: SanityConfig, problems: Path, n_kept: int) -> list[str]:
    """Options of `rl run` that train on a set, sampled as it was."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    if n_kept < RlConfig().prompts_per_step:
        settings |= {"prompts_per_step": n_kept, "updates_per_rollout": 1}
    return RlConfig.of({**settings, "problems": str(problems), "n_problems": n_kept}).arguments()


def new_sanity_set(config: SanityConfig, out: str | Path | None, progress: Progress | None) -> SanityResult:
    """Makes a folder, samples and selects.

    Raises:
        ProbeError: The problems, the model, the device or the folder cannot be had, or the engine failed.
    """
    progress = progress or Progress()
    if config.problems is not None:
        read_problems(config.problems)  # a bad line is found before a model is fetched
    start = Start.of(config, progress, out)
    with Session.new(
        lambda path: SanityDirectory.create(path, config, start.provenance()),
        f"sanity-set-{Path(config.model).name}",
        out,
        progress,
    ) as session:
        return _execute(session, start)


def resume_sanity_set(path: Path, progress: Progress | None) -> SanityResult:
    """Samples what is missing; a finished set is only reported.

    Raises:
        TableError: The folder is none of a sanity set, or model or problems have changed.
    """
    with Session.resume(SanityDirectory, path, progress) as session:
        if session.complete:
            return _write(session.run)
        return _execute(session, Start.again(session.run, session.run.config, session.progress))


def _execute(session: Session[SanityDirectory], start: Start) -> SanityResult:
    directory, progress = session.run, session.progress
    environment = settings_of(directory.config, start.device).environment
    process = EngineProcess(directory.config.rollout_engine, environment, directory.path / "logs" / "sanity-set.log")

    def on_event(event: Event) -> None:
        told(progress, _PASS, event)
        if isinstance(event, Identity):
            directory.note_engine(event.facts)

    progress.begin(_PASS, "rl sanity-set")
    with session.stoppable("finished chunks of problems are kept"):
        process.run(SanityJob(str(directory.path), str(start.model.path), start.device), on_event)
    progress.end(_PASS, "done")
    directory.finish()
    return _write(directory)


def _write(directory: SanityDirectory) -> SanityResult:
    """Writes the report of a finished set."""
    from mismatch_probe.report.render import write_report

    result = SanityResult(directory.path, directory.document)
    write_report(result.report(), {}, directory.path)
    return result
