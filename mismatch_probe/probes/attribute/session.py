"""One attribution from beginning to end: plan, comparison, passes, document, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.config import AttributeOptions, CompareConfig
from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.engines import devices
from mismatch_probe.engines.attribute.trace import MOST_BYTES, TraceFiles
from mismatch_probe.errors import DiskFull, EngineMissing, ProbeError, UsageError
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.probes.attribute.attribution import attribution_of
from mismatch_probe.probes.attribute.pair import AttributedPair, open_pair
from mismatch_probe.probes.attribute.passes import FOLDER, Evidence, PassStore, inside_name
from mismatch_probe.probes.attribute.processes import Process, Processes
from mismatch_probe.probes.attribute.settings import Context, Setting, choose, settings_of
from mismatch_probe.probes.comparison import KEPT, begun, run_passes, write_run
from mismatch_probe.probes.own_pass import model_of
from mismatch_probe.probes.planning import PassEstimate, Plan, estimate, make_plan, plan_preflight
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session, write_pages
from mismatch_probe.probes.workers import Workers
from mismatch_probe.report.attribution import attribution_report
from mismatch_probe.report.model import Report
from mismatch_probe.results.attribution import Attribution, AttributionPlan, PlannedProcess, PlannedSetting
from mismatch_probe.runs.comparison import RunDirectory

# A process's start, seconds, and how much longer one request at a time takes than a batch.
_START, _ALONE = 10.0, 6.0


@dataclass(frozen=True)
class AttributeResult:
    """A finished attribution.

    Attributes:
        path: The run directory.
        attribution: The content of `attribute/attribution.json`.
        figures: Figure files by name.
    """

    path: Path
    attribution: Attribution
    figures: dict[str, Path]

    @property
    def failed(self) -> list[str]:
        """Passes that were asked for and could not be made."""
        return list(self.attribution.failed)

    @property
    def page(self) -> Path:
        """The report as one HTML file."""
        return self.path / FOLDER / "report.html"

    def report(self) -> Report:
        """What is shown of it."""
        return attribution_report(self.attribution, str(self.path))


def new_attribution(
    config: CompareConfig, out: str | Path | None, options: Mapping[str, Any], progress: Progress | None
) -> AttributeResult:
    """Compares, then takes the gap apart.

    Raises:
        ProbeError: What a comparison raises, and what its passes do.
    """
    asked = AttributeOptions(**options)
    plan = make_plan(config_of(config, asked), progress, out)
    with begun(plan, out, progress) as session:
        return _attribute(session, asked, plan)


def resume_attribution(path: Path, options: Mapping[str, Any], progress: Progress | None) -> AttributeResult:
    """Makes what is missing of a run, of the comparison and of the attribution.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
        ProbeError: An engine failed.
    """
    with Session.resume(RunDirectory, path, progress) as session:
        return _attribute(session, _options(session.run, options))


def attribute_again(path: Path, options: Mapping[str, Any]) -> AttributeResult:
    """Computes the document again, without an engine.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    with Session.resume(RunDirectory, path, None) as session:
        pair = open_pair(session.run, asked := _options(session.run, options))
        return _write(pair, PassStore(pair, asked))


def config_of(config: CompareConfig, options: AttributeOptions) -> CompareConfig:
    """The comparison that an attribution begins with: the pair, and the trainer in FP32 beside it."""
    if len(config.trainer_modes) > 1:
        raise UsageError("An attribution takes one pair apart, so it needs one --trainer-mode.", "Name one of the two.")
    rollout, trainer = options.dtypes
    trainers = tuple(dict.fromkeys((trainer, "float32")))
    return config.replace(rollout_dtypes=(rollout,), trainer_dtypes=trainers)


def _attribute(session: Session[RunDirectory], options: AttributeOptions, plan: Plan | None = None) -> AttributeResult:
    run = session.run
    with session.stoppable(KEPT, f"mismatch-probe attribute --resume {run.path}"):
        _check_device(run)
        if not session.complete:
            _remember(run, options)
            run_passes(session, plan)
        pair = open_pair(run, options)
        store = PassStore(pair, options)
        _remember(run, options)
        make_missing(store, pair, options, session.progress, again=plan is None)
    session.progress.message("computing contributions and figures")
    result = _write(pair, store)
    write_run(analyse(run))  # the comparison's report quotes the answer
    return result


def _remember(run: RunDirectory, options: AttributeOptions) -> None:
    """Keeps with the run what its attribution was asked for."""
    run.manifest.attribution = options.model_dump(mode="json")
    run.save()


def _write(pair: AttributedPair, store: PassStore) -> AttributeResult:
    """The document, and what is shown of it."""
    path, folder = pair.run.path, pair.run.path / FOLDER
    found = attribution_of(Evidence(pair, store, store.load()))
    found.write(folder / "attribution.json")
    return AttributeResult(path, found, write_pages(found, lambda shown: attribution_report(shown, str(path)), folder))


def _check_device(run: RunDirectory) -> None:
    """Raises:
    UsageError: The run's engines ran on a device that is not here, where passes would differ by the device, too.
    """
    if run.manifest.device == "cuda" and not devices.gpu_present():
        raise UsageError("This run began on cuda, and this machine has no GPU.", "Use --from, or continue it there.")


def _options(run: RunDirectory, given: Mapping[str, Any]) -> AttributeOptions:
    """What is given, and an earlier attribution's where it is not."""
    return AttributeOptions(**{**(run.manifest.attribution or {}), **given})


def make_missing(
    store: PassStore, pair: AttributedPair, options: AttributeOptions, progress: Progress, *, again: bool
) -> None:
    """Makes the passes that are not there yet.

    Args:
        store: Where they are.
        pair: What is taken apart.
        options: The attribution's.
        progress: Told about it.
        again: Whether what failed gets another try.

    Raises:
        ProbeError: No other engine could run either.
    """
    missing = store.missing(again=again)
    if not missing:
        return
    dtypes = (*options.dtypes, *(options.layer_dtypes if options.layers else ()))
    widest = max(DTYPE_INFOS[dtype].bytes for dtype in dtypes)
    model = model_of(pair.run, pair.config, progress, widest, options.dtypes[:1])
    processes = Processes(store, pair, options, model).of(missing)
    try:
        with Workers(pair.run.path / "logs") as workers:
            for index, process in enumerate(processes):
                later = [one.wanted for one in processes[index + 1 :]]
                try:
                    workers.run(process.wanted, process.name, process.job, progress, later)
                except (DiskFull, EngineMissing):
                    raise
                except ProbeError as error:
                    progress.end(process.name, error.what)
                    _fail(store, process, error)
    finally:  # they hold the user's data, and whoever goes on makes them again
        for folder in (pair.run.path / FOLDER).glob("trace-*"):
            TraceFiles(folder).discard()


def _fail(store: PassStore, process: Process, error: ProbeError) -> None:
    """Keeps why passes could not be made; those that the process had finished stay."""
    lost = [*process.passes, *(inside_name(dtype) for dtype in process.traces)]
    for name in (name for name in lost if not store.files.has(name)):
        empty: dict[str, NDArray[np.generic]] = {"logprobs": np.empty(0, np.float32), "index": np.empty(0, np.int64)}
        store.files.at(name).save({"failed": error.what}, empty)


def plan_attribution(config: CompareConfig, options: Mapping[str, Any]) -> AttributionPlan:
    """Plans; loads nothing.

    Raises:
        ProbeError: The model is not there, no engine is installed, or a setting is not known.
    """
    asked = AttributeOptions(**options)
    plan = make_plan(config_of(config, asked), weights=False)
    rollout, trainer = asked.dtypes
    context = Context(
        device=plan.device,
        gpus=len(devices.gpu_names()),
        rollout_dtype=rollout,
        trainer_dtype=trainer,
        trainer_mode=plan.config.trainer_modes[0] if trainer != "float32" else "cast",
        trainer_layout=plan.config.trainer_layout,
        model=plan.model.config,
        engine={"enforce_eager": plan.device == "cpu" or plan.config.eager},
        attention=plan.config.trainer_attn or "sdpa",
        rollout_engine=plan.config.rollout_engine,
    )
    settings = settings_of(context)
    wanted = choose(settings, asked.settings)
    rows = estimate(plan)
    reasons = {
        setting.name: setting.why_missing(context)
        or ("" if setting in wanted else "slow: --settings all, or its name" if setting.slow else "not asked for")
        for setting in settings
    }
    if asked.layers and not context.engine["enforce_eager"]:
        reasons["rollout-eager"] = ""  # always beside the layers
    chosen = [setting for setting in settings if not reasons[setting.name]]
    passes = [PlannedProcess(name=str(row.pass_id), n_passes=1, seconds=row.seconds) for row in rows]
    processes = _processes(chosen, rows, asked)
    return AttributionPlan(
        model=plan.config.model,
        device=plan.device,
        passes=tuple(passes),
        processes=tuple(processes),
        settings=tuple(PlannedSetting(name=s.name, change=s.change, why=reasons[s.name]) for s in settings),
        seconds=sum(process.seconds for process in (*passes, *processes)),
        disk_gib=len(asked.layer_dtypes) * MOST_BYTES / devices.GIB if asked.layers else 0.0,
        findings=plan_preflight(plan),
    )


def _processes(chosen: list[Setting], rows: list[PassEstimate], options: AttributeOptions) -> list[PlannedProcess]:
    decode = next(row.seconds for row in rows if row.pass_id.side == "rollout")
    score = max(1.0, next(row.seconds for row in rows if row.pass_id.side == "trainer") - _START)
    same = [setting for setting in chosen if setting.side == "rollout" and setting.arguments is None]
    alone = sum(_ALONE * decode for setting in same if setting.how == "decode-alone")
    found = [("rollout as it sampled", 2 + len(same), decode * 2 + alone)]
    found += [(f"rollout {s.key}", 1, decode) for s in chosen if s.side == "rollout" and s.arguments is not None]
    variants = [setting for setting in chosen if setting.side == "trainer"]
    found.append(("trainer, one change at a time", 2 + len(variants), _START + score * (2 + len(variants))))
    if options.layers:
        found.append(("layers and modules", len(options.layer_dtypes), _START + 6 * score))
    return [PlannedProcess(name=name, n_passes=passes, seconds=seconds) for name, passes, seconds in found]
