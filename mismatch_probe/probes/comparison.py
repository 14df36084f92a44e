"""One comparison from beginning to end: passes, analysis, what it leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch_probe.config import CompareConfig, Limit, check_lengths
from mismatch_probe.engines import devices
from mismatch_probe.errors import TableError, UsageError
from mismatch_probe.files import write_text
from mismatch_probe.metrics.catalog import CATALOG, in_order, ratio_key
from mismatch_probe.passes import PassId
from mismatch_probe.probes.analysis import Analysis, analyse, token_view
from mismatch_probe.probes.compare import PassRunner
from mismatch_probe.probes.planning import Plan, make_plan
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.recorded import kept
from mismatch_probe.probes.session import Session, check_device, check_files, write_pages
from mismatch_probe.report.data import ReportData
from mismatch_probe.results.comparison import Comparison
from mismatch_probe.results.manifest import Manifest, ModelRecord, PromptsRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import DUMP, kind_of
from mismatch_probe.runs.passes import Passes, passes_of

KEPT = "finished passes are kept"


@dataclass(frozen=True)
class RunResult:
    """A compared run.

    Attributes:
        path: The run directory.
        data: Everything that its report shows; `data.summary` is the content of `summary.json`.
        figures: Figure files by name.
    """

    path: Path
    data: ReportData
    figures: dict[str, Path]

    @property
    def summary(self) -> Comparison:
        """What the comparison found."""
        return self.data.summary

    def frame(self) -> pd.DataFrame:
        """A row per pair and metric, as in `summary.csv`."""
        return summary_frame(self.summary)

    @property
    def exceeded(self) -> bool:
        """Whether a limit of `fail_on` is exceeded, or inconclusive."""
        return any(row.verdict != "ok" for row in self.summary.limits)

    @property
    def complete(self) -> bool:
        """Whether every pass that can run here has run."""
        return self.data.manifest.status == "complete"


def parse_limits(texts: Sequence[str], passes: Passes | None, ratio_limits: Sequence[float]) -> list[Limit]:
    """Reads `--fail-on`.

    Args:
        texts: The limits.
        passes: What is compared; None where that is not known yet.
        ratio_limits: Factors of F(τ) that are computed beside the fixed one.

    Raises:
        UsageError: A limit is malformed, or applies to no pair of this comparison.
    """
    limits = [Limit.parse(text, in_order([*CATALOG, *map(ratio_key, ratio_limits)])) for text in texts]
    if passes is None:
        return limits
    pairs = [(rollout.dtype, trainer.dtype) for rollout in passes.rollouts for trainer in passes.trainers]
    for limit in limits:
        if not any(limit.applies_to(rollout, trainer) for rollout, trainer in pairs):
            raise UsageError(f"--fail-on {limit.text!r} applies to no pair of this comparison.", "Check its dtypes.")
    return limits


def begun(
    plan: Plan, out: str | Path | None, progress: Progress | None
) -> AbstractContextManager[Session[RunDirectory]]:
    """A new comparison; see `Session.new`."""
    name = plan.config.source or plan.config.model
    return Session.new(lambda path: RunDirectory.create(path, _manifest(plan)), name, out, progress)


def run_passes(session: Session[RunDirectory], plan: Plan | None = None) -> None:
    """Runs the passes that are missing; those that failed are tried again.

    Args:
        session: On the comparison.
        plan: Of a new one; None to make it again.

    Raises:
        ProbeError: Model, prompts or device have changed, or no pass can run.
    """
    run, progress = session.run, session.progress
    if plan is None:
        # An engine that does not run a dtype will not run it now.
        run.manifest.passes = {k: v for k, v in run.manifest.passes.items() if v.status != "failed"}
        for record in run.manifest.passes.values():
            record.extension_failure = ""
        plan = _plan_again(run, progress)
    if plan.recorded is not None:
        plan = replace(plan, recorded=kept(plan.recorded, run))
    _execute(plan, run, progress)


def new_run(
    config: CompareConfig, out: str | Path | None, fail_on: Sequence[str], progress: Progress | None
) -> RunResult:
    """Samples, scores and compares; see `mismatch_probe.compare`."""
    if config.source and kind_of(Path(config.source)) not in (None, DUMP):
        return _finished_run(config, out, fail_on)
    passes = None if config.source else passes_of(config)
    parse_limits(fail_on, passes, config.ratio_limits)  # before anything is fetched
    progress = progress or Progress()
    plan = make_plan(config, progress, out)
    limits = parse_limits(fail_on, plan.passes, config.ratio_limits)
    with begun(plan, out, progress) as session:
        return _compare(session, limits, plan)


def resume_run(path: Path, fail_on: Sequence[str], progress: Progress | None, changes: Mapping[str, Any]) -> RunResult:
    """Runs what is missing of a comparison; see `Run.resume`."""
    with Session.resume(RunDirectory, path, progress) as session:
        _change(session.run, changes)
        return _compare(session, parse_limits(fail_on, session.run.passes, session.run.manifest.config.ratio_limits))


def report_run(
    path: Path,
    fail_on: Sequence[str],
    predict_lengths: Sequence[int] | None,
    extrapolate: bool | None,
    ratio_limits: Sequence[float] | None,
) -> RunResult:
    """Computes summary, figures and reports again; see `Run.report`."""
    check_lengths(predict_lengths or ())
    run = RunDirectory.open(path)
    ratio_limits = run.manifest.config.ratio_limits if ratio_limits is None else ratio_limits
    limits = parse_limits(fail_on, run.passes, ratio_limits)
    return write_run(analyse(run, ratio_limits), limits, predict_lengths=predict_lengths, extrapolate=extrapolate)


def plot_run(path: Path) -> dict[str, Path]:
    """Draws the figures again; see `Run.plot`."""
    from mismatch_probe.report.figures import draw

    return draw(analyse(RunDirectory.open(path)).report(), path / "figures")


def _finished_run(config: CompareConfig, out: str | Path | None, fail_on: Sequence[str]) -> RunResult:
    """What `--from RUN` asks for: the same as `report RUN`, since a finished run has everything.

    Raises:
        UsageError: Something else is asked for, too.
    """
    only = CompareConfig(
        source=config.source,
        predict_lengths=config.predict_lengths,
        extrapolate=config.extrapolate,
        ratio_limits=config.ratio_limits,
    )
    if config != only or out is not None:
        raise UsageError(
            "Options of a new run cannot be combined with --from RUN: its passes are there.",
            "Leave them out, or give --from a file of recorded sequences.",
        )
    lengths, extrapolate = config.predict_lengths or None, config.extrapolate or None
    return report_run(Path(str(config.source)), fail_on, lengths, extrapolate, config.ratio_limits or None)


def _compare(session: Session[RunDirectory], limits: Sequence[Limit], plan: Plan | None = None) -> RunResult:
    with session.stoppable(KEPT):
        run_passes(session, plan)
    session.progress.message("computing metrics and figures")
    return write_run(analyse(session.run), limits)


def write_run(
    analysis: Analysis,
    limits: Sequence[Limit] = (),
    *,
    predict_lengths: Sequence[int] | None = None,
    extrapolate: bool | None = None,
) -> RunResult:
    """Writes summary, figures and reports of a run; arguments as in `Analysis.report`."""
    run = analysis.run
    data = analysis.report(limits, predict_lengths=predict_lengths, extrapolate=extrapolate)
    data = replace(data, tokens=token_view(run, analysis.diagonal))
    return RunResult(run.path, data, write_outputs(run, data))


# What may still change on resume, and the side of which no pass may be finished yet, since the others would differ.
_CHANGEABLE = {
    "memory_budget_gib": "",
    "predict_lengths": "",
    "extrapolate": "",
    "ratio_limits": "",
    "trainer_layout": "trainer",
    "trainer_attn": "trainer",
    "rollout_batch": "rollout",
    "engine_args": "rollout",
    "eager": "rollout",
    "exact_kl": "rollout",
}


def _change(run: RunDirectory, changes: Mapping[str, Any]) -> None:
    """Puts the user's changes into the run's manifest."""
    for name in changes:
        if name not in _CHANGEABLE:
            raise UsageError(
                f"{CompareConfig.called(name)} cannot be combined with --resume: a run continues as it was configured.",
                "Leave it out.",
            )
        passes = run.manifest.passes  # a repeat belongs to the pass that it repeats
        done = [p for p in run.finished_passes() if PassId.parse(p).side == _CHANGEABLE[name] and not passes[p].repeats]
        if done:
            raise UsageError(
                f"{CompareConfig.called(name)} cannot change any more: {done[0]} has finished without it.",
                "Leave it out, or start a new run.",
            )
    manifest, sizes = run.manifest, run.manifest.sizes
    manifest.config = manifest.config.replace(**changes)
    manifest.sizes = replace(sizes, **{name: value for name, value in changes.items() if hasattr(sizes, name)})


def _plan_again(run: RunDirectory, progress: Progress) -> Plan:
    """The plan of a run that is resumed: the same model, prompts and device, or an error."""
    config = run.manifest.config
    # Sizes that were left to the machine's default stay what they were, and a hub id stays at its commit.
    # Of a recorded run the file itself says how many prompts, samples and tokens there are.
    own = () if config.source is None else ("num_prompts", "samples_per_prompt", "max_tokens")
    sizes = {name: value for name, value in vars(run.manifest.sizes).items() if name not in own}
    fixed = {**sizes, "revision": run.manifest.model.revision}
    plan = make_plan(config.replace(**fixed), progress, run.path)
    if plan.prompts.sha256 != run.manifest.prompts.sha256:
        raise TableError(
            "The prompts have changed since this run began.", "Restore the prompt file, or start a new run."
        )
    check_device(run, plan.device)
    return plan


def _execute(plan: Plan, run: RunDirectory, progress: Progress) -> None:
    """Runs the passes that are missing, and sees to it that they are all of one model."""
    hashes, model = _in_background(plan.model.file_hashes), run.manifest.model
    if model.files is not None:
        progress.message("checking that the model is still the same")
        check_files(run, hashes.result())
    try:
        PassRunner(plan, run, progress).execute()
    finally:
        # No pass of another model may ever join these; but nobody waits for that who wants to stop.
        if hashes.done() and hashes.exception() is None and run.finished_passes():
            model.files = hashes.result() or None  # of no model, where a dump brings both sides
            run.save()
    model.files = hashes.result() or None  # of no model, where a dump brings both sides
    run.save()


def _in_background(work: Callable[[], dict[str, str]]) -> Future[dict[str, str]]:
    """Runs `work` while the engines are busy; an interrupted command does not wait for it."""
    future: Future[dict[str, str]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _manifest(plan: Plan) -> Manifest:
    recorded = plan.recorded
    name = plan.config.model if plan.model.config else f"the recorded run {plan.prompts.source}"
    return Manifest(
        **Manifest.stamp(),
        status="running",
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        config=plan.config,
        sizes=plan.sizes,
        device=plan.device,
        model=ModelRecord(name=name, revision=plan.model.revision, path=str(plan.model.path)),
        prompts=PromptsRecord(source=plan.prompts.source, n=plan.sizes.num_prompts, sha256=plan.prompts.sha256),
        recorded=None if recorded is None else recorded.recorded,
        environment=devices.environment(),
    )


def summary_frame(summary: Comparison) -> pd.DataFrame:
    """The pairs' metrics flat, a row per pair and metric: what `summary.csv` holds."""
    about = ["rollout_pass", "trainer_pass", "rollout_dtype", "trainer_dtype", "trainer_mode", "on_policy"]
    about += ["n_tokens", "n_sequences", "n_nonfinite", "n_excluded"]
    rows = [
        {**{name: getattr(pair, name) for name in about}, "metric": key, **asdict(value)}
        for pair in summary.pairs
        for key, value in pair.metrics.items()
    ]
    return pd.DataFrame(rows, columns=[*about, "metric", "value", "ci_low", "ci_high", "why"])


def write_outputs(run: RunDirectory, data: ReportData) -> dict[str, Path]:
    """Writes summary, figures and reports into the run's folder; returns the figures."""
    from mismatch_probe.report.compare import compare_report

    data.summary.write(run.path / "summary.json")
    write_text(run.path / "summary.csv", summary_frame(data.summary).to_csv(index=False, lineterminator="\n"))
    return write_pages(data, compare_report, run.path)
