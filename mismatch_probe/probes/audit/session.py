"""One audit from beginning to end: unsupported dtypes, comparison, measurements, verdict, files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.config import DEFAULT_MODEL, AuditOptions, CompareConfig
from mismatch_probe.engines.models import resolve
from mismatch_probe.engines.vllm.refusals import refusal
from mismatch_probe.errors import DtypeRefused, Interrupted, ProbeError, UsageError
from mismatch_probe.files import locked, write_text
from mismatch_probe.probes.audit.baseline import compare_audits, read_audit
from mismatch_probe.probes.audit.document import audit_of
from mismatch_probe.probes.audit.measure import FOLDER, Measurements
from mismatch_probe.probes.audit.profile import Profile, load_profile
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import new_run, resume_run
from mismatch_probe.results.audit import Audit, Verdict
from mismatch_probe.results.manifest import AuditRecord
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import default_folder

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
    path = Path(out) if out is not None else default_folder(config.source or config.model or DEFAULT_MODEL)
    try:
        new_run(config.replace(rollout_dtypes=dtypes), path, (), progress)
    except UsageError:
        raise  # nothing was begun; what lies at the path may be somebody else's
    except BaseException as error:
        with suppress(ProbeError):
            _remember(RunDirectory.open(path), asked, unsupported)
        if isinstance(error, Interrupted):
            raise Interrupted(error.what, f"Continue with: {_resume(path, asked, baseline)}") from None
        raise
    return _finish(path, asked, baseline, progress, unsupported, engines=True)


def resume_audit(
    path: Path, options: Mapping[str, Any], baseline: str | Path | None, progress: Progress | None
) -> AuditResult:
    """Goes on with the passes and the measurements that are missing, and judges.

    Raises:
        ProbeError: The folder holds no run, its model has changed, or an engine failed.
    """
    progress = progress or Progress()
    run = RunDirectory.open(path)
    asked = _options(run, options)
    _check(asked, baseline)
    if run.manifest.status != "complete":
        with locked(path):
            run = RunDirectory.open(path)
            _remember(run, asked, _known_unsupported(run))
        try:
            resume_run(path, (), progress, {})
        except Interrupted as error:
            raise Interrupted(error.what, f"Continue with: {_resume(path, asked, baseline)}") from None
    return _finish(path, asked, baseline, progress, None, engines=True)


def audit_run(path: Path, options: Mapping[str, Any], baseline: str | Path | None) -> AuditResult:
    """Judges a finished comparison without an engine, as far as it goes.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    asked = _options(RunDirectory.open(path), options)
    return _finish(path, asked, baseline, Progress(), None, engines=False)


def _finish(
    path: Path,
    options: AuditOptions,
    baseline: str | Path | None,
    progress: Progress,
    unsupported: Mapping[str, str] | None,
    *,
    engines: bool,
) -> AuditResult:
    """Judges a run.

    Args:
        path: Its folder.
        options: Of the audit.
        baseline: An older audit.
        progress: Told what is done.
        unsupported: By rollout dtype that the engine does not support, its reason; None for what an earlier audit of
            the run knew.
        engines: Whether to measure what is missing.
    """
    profile, old = _check(options, baseline)
    with locked(path):
        run = RunDirectory.open(path)
        known = _known_unsupported(run) if unsupported is None else unsupported
        measurements = Measurements(run, options)
        if engines:
            _remember(run, options, known)
            measurements.make_missing(progress, _resume(path, options, baseline))
            progress.message("computing verdict and figures")
        audit = audit_of(run, options, profile, measurements, known)
        if old is not None:
            audit = audit.model_copy(update={"baseline": compare_audits(old, audit, str(baseline))})
        return AuditResult(path, audit, _write(path, audit))


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


def _write(run: Path, audit: Audit) -> dict[str, Path]:
    from mismatch_probe.report.audit import audit_report
    from mismatch_probe.report.figures import draw
    from mismatch_probe.report.junit import junit_xml
    from mismatch_probe.report.render.files import write_report

    folder = run / FOLDER
    audit.write(folder / "audit.json")
    write_text(folder / "junit.xml", junit_xml(audit))
    figures = draw(audit, folder / "figures")
    write_report(audit_report(audit, run), figures, folder)
    return figures


def _unsupported(config: CompareConfig) -> dict[str, str]:
    """By rollout dtype that vLLM does not support for the model, its sentence; read without loading anything."""
    if config.source is not None and not config.model:
        return {}
    known = resolve(config.model or DEFAULT_MODEL, revision=config.revision, weights=False)
    return {dtype: why for dtype in config.rollout_dtypes if (why := refusal(known.config, dtype))}
