"""One audit from beginning to end: unsupported dtypes, comparison, measurements, verdict, files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.config import DEFAULT_MODEL, AuditOptions, CompareConfig
from mismatch_probe.engines import registry
from mismatch_probe.engines.models import resolve
from mismatch_probe.errors import DtypeRefused
from mismatch_probe.files import write_text
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.probes.audit.baseline import compare_audits, read_audit
from mismatch_probe.probes.audit.document import audit_of
from mismatch_probe.probes.audit.measure import FOLDER, Measurements
from mismatch_probe.probes.audit.profile import Profile, load_profile
from mismatch_probe.probes.comparison import KEPT, begun, run_passes, write_run
from mismatch_probe.probes.planning import Plan, make_plan
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session, write_pages
from mismatch_probe.results.audit import Audit, Verdict
from mismatch_probe.results.manifest import AuditRecord
from mismatch_probe.runs.comparison import RunDirectory

_KEPT = ("profile", "planned_tokens", "step_tokens", "learning_rates")


@dataclass(frozen=True)
class AuditResult:
    """A finished audit.

    Attributes:
        path: The run directory; everything of the audit lies in its folder `audit`.
        audit: What `audit.json` holds.
        figures: Figure files by name.
    """

    path: Path
    audit: Audit
    figures: dict[str, Path]

    @property
    def verdict(self) -> Verdict:
        """`ok`, `warn`, `fail` or `inconclusive`."""
        return self.audit.verdict

    @property
    def regressed(self) -> bool:
        """Whether a baseline was given, and something is worse than it was there."""
        return self.audit.regressed

    @property
    def failed(self) -> bool:
        """Whether a gate has to close: fail, inconclusive, a regression, or under `strict` a warning."""
        return self.audit.failed


def new_audit(
    config: CompareConfig,
    options: Mapping[str, Any],
    out: str | Path | None,
    baseline: str | Path | None,
    progress: Progress | None,
) -> AuditResult:
    """Compares, measures and judges.

    Raises:
        DtypeRefused: The engine refuses the model in every dtype that was asked for; nothing was loaded.
        ProbeError: See `mismatch_probe.errors`; what is finished stays on disk.
    """
    progress = progress or Progress()
    asked = AuditOptions(**options)
    _check(asked, baseline)  # mistakes are told before minutes of work
    unsupported = _unsupported(config)
    for why in unsupported.values():
        progress.message(why)
    dtypes = tuple(dtype for dtype in config.rollout_dtypes if dtype not in unsupported)
    if not dtypes:
        raise DtypeRefused(" ".join(unsupported.values()), "Audit it with --rollout-dtypes bf16.")
    plan = make_plan(config.replace(rollout_dtypes=dtypes), progress, out)
    with begun(plan, out, progress) as session:
        return _audit(session, asked, baseline, unsupported, plan)


def resume_audit(
    path: Path, options: Mapping[str, Any], baseline: str | Path | None, progress: Progress | None
) -> AuditResult:
    """Goes on with the passes and the measurements that are missing, and judges.

    Raises:
        ProbeError: The folder holds no run, its model has changed, or an engine failed.
    """
    with Session.resume(RunDirectory, path, progress) as session:
        return _audit(session, _options(session.run, options), baseline, _known_unsupported(session.run))


def audit_run(path: Path, options: Mapping[str, Any], baseline: str | Path | None) -> AuditResult:
    """Judges a finished comparison without an engine, as far as it goes.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    with Session.resume(RunDirectory, path, None) as session:
        run = session.run
        asked = _options(run, options)
        profile, old = _check(asked, baseline)
        audit = audit_of(analyse(run), asked, profile, Measurements(run, asked), _known_unsupported(run))
        return _write(run, audit, old, baseline)


def _audit(
    session: Session[RunDirectory],
    options: AuditOptions,
    baseline: str | Path | None,
    unsupported: Mapping[str, str],
    plan: Plan | None = None,
) -> AuditResult:
    """Runs what is missing, and judges.

    Args:
        session: On the comparison.
        options: Of the audit.
        baseline: An older audit.
        unsupported: By rollout dtype that the engine does not support, its reason.
        plan: Of a new comparison.
    """
    profile, old = _check(options, baseline)
    run, analysis = session.run, None
    _remember(run, options, unsupported)
    with session.stoppable(KEPT, _resume(run.path, options, baseline)):
        if not session.complete:
            run_passes(session, plan)
            session.progress.message("computing metrics and figures")
            write_run(analysis := analyse(run))
        measurements = Measurements(run, options)
        measurements.make_missing(session.progress)
    session.progress.message("computing verdict and figures")
    audit = audit_of(analysis or analyse(run), options, profile, measurements, unsupported)
    return _write(run, audit, old, baseline)


def _resume(path: Path, options: AuditOptions, baseline: str | Path | None) -> str:
    """The command that goes on with an audit."""
    # A run remembers everything else that its audit was asked.
    words = AuditOptions(pairs=options.pairs, strict=options.strict).arguments()
    old = [] if baseline is None else ["--baseline", str(baseline)]
    return shlex.join(["mismatch-probe", "audit", "--resume", str(path), *words, *old])


def _known_unsupported(run: RunDirectory) -> dict[str, str]:
    """What an earlier audit of the run knew of dtypes that the engine does not support."""
    return {} if run.manifest.audit is None else run.manifest.audit.unsupported


def _remember(run: RunDirectory, options: AuditOptions, unsupported: Mapping[str, str]) -> None:
    """Keeps with the run what its audit was asked for."""
    run.manifest.audit = AuditRecord(options=options.model_dump(mode="json"), unsupported=dict(unsupported))
    run.save()


def _options(run: RunDirectory, given: Mapping[str, Any]) -> AuditOptions:
    """What is given, and of what decides about measurements an earlier audit's where it is not."""
    kept = {} if run.manifest.audit is None else run.manifest.audit.options
    found = {name: value for name, value in kept.items() if name in _KEPT}
    return AuditOptions(**{**found, **given})


def _check(options: AuditOptions, baseline: str | Path | None) -> tuple[Profile, Audit | None]:
    return load_profile(options.profile), None if baseline is None else read_audit(baseline)


def _write(run: RunDirectory, audit: Audit, old: Audit | None, baseline: str | Path | None) -> AuditResult:
    """The document with its comparison to an older one, and what is shown of it."""
    from mismatch_probe.report.audit import audit_report
    from mismatch_probe.report.junit import junit_xml

    if old is not None:
        audit = audit.model_copy(update={"baseline": compare_audits(old, audit, str(baseline))})
    folder = run.path / FOLDER
    audit.write(folder / "audit.json")
    write_text(folder / "junit.xml", junit_xml(audit))
    return AuditResult(run.path, audit, write_pages(audit, lambda shown: audit_report(shown, run.path), folder))


def _unsupported(config: CompareConfig) -> dict[str, str]:
    """By rollout dtype that the engine does not support for the model, its sentence; read without loading anything."""
    if config.source is not None and not config.model:
        return {}
    known = resolve(config.model or DEFAULT_MODEL, revision=config.revision, weights=False)
    engine = registry.find(config.rollout_engine)
    return {dtype: why for dtype in config.rollout_dtypes if (why := engine.why_no_dtype(known.config, dtype))}
