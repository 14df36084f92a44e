"""One audit from beginning to end: refusals, comparison, measurements, verdict, files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mismatch_probe.config import DEFAULT_MODEL, CompareConfig
from mismatch_probe.engines.models import resolve
from mismatch_probe.engines.refusals import refusal
from mismatch_probe.errors import DtypeRefused, Interrupted, ProbeError, UsageError
from mismatch_probe.files import locked, write_json, write_text
from mismatch_probe.probes.audit.baseline import compare_audits, read_audit
from mismatch_probe.probes.audit.document import audit_document
from mismatch_probe.probes.audit.junit import junit_xml
from mismatch_probe.probes.audit.measure import FOLDER, Measurements
from mismatch_probe.probes.audit.options import AuditOptions
from mismatch_probe.probes.audit.profile import Profile, load_profile
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import default_folder, new_run, resume_run
from mismatch_probe.results.manifest import AuditRecord
from mismatch_probe.runs import RunDirectory

_KEPT = ("profile", "planned_tokens", "step_tokens", "learning_rates")


@dataclass(frozen=True)
class AuditResult:
    """A finished audit.

    Attributes:
        path: The run directory; everything of the audit lies in its folder `audit`.
        document: The content of `audit.json`.
        figures: Figure files by name.
        strict: Whether a warning counts as a failure.
    """

    path: Path
    document: dict[str, Any]
    figures: dict[str, Path]
    strict: bool

    @property
    def verdict(self) -> str:
        """`pass`, `warn`, `fail` or `not judged`."""
        return str(self.document["verdict"])

    @property
    def regressed(self) -> bool:
        """Whether a baseline was given, and something is worse than it was there."""
        baseline = self.document["baseline"]
        return bool(baseline and baseline["regressions"])

    @property
    def failed(self) -> bool:
        """Whether a gate has to close: a failure, what cannot be judged, a regression, or under `strict` a warning."""
        bad = ("fail", "not judged", "warn") if self.strict else ("fail", "not judged")
        return self.verdict in bad or self.regressed


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
    refused = _refused(config)
    for why in refused.values():
        progress.message(why)
    dtypes = tuple(dtype for dtype in config.rollout_dtypes if dtype not in refused)
    if not dtypes:
        raise DtypeRefused(" ".join(refused.values()), "Audit it with --rollout-dtypes bf16.")
    path = Path(out) if out is not None else default_folder(config.source or config.model or DEFAULT_MODEL)
    try:
        new_run(replace(config, rollout_dtypes=dtypes), path, (), progress)
    except UsageError:
        raise  # nothing was begun; what lies at the path may be somebody else's
    except BaseException as error:
        with suppress(ProbeError):
            _remember(RunDirectory.open(path), asked, refused)
        if isinstance(error, Interrupted):
            raise Interrupted(error.what, f"Continue with: {_resume(path, asked, baseline)}") from None
        raise
    return _finish(path, asked, baseline, progress, refused, engines=True)


def resume_audit(
    path: Path, options: Mapping[str, Any], baseline: str | Path | None, progress: Progress | None
) -> AuditResult:
    """Goes on with the passes and the measurements that a run lacks, and judges.

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
            _remember(run, asked, _known_refusals(run))
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
    refused: Mapping[str, str] | None,
    *,
    engines: bool,
) -> AuditResult:
    """Judges a run.

    Args:
        path: Its folder.
        options: Of the audit.
        baseline: An older audit.
        progress: Told what is done.
        refused: By rollout dtype the engine's refusal; None for what an earlier audit of the run knew.
        engines: Whether to measure what is missing.
    """
    profile, old = _check(options, baseline)
    with locked(path):
        run = RunDirectory.open(path)
        known = _known_refusals(run) if refused is None else refused
        measurements = Measurements(run, options)
        if engines:
            _remember(run, options, known)
            measurements.make_missing(progress, _resume(path, options, baseline))
            progress.message("computing verdict and figures")
        document = audit_document(run, options, profile, measurements, known)
        document["baseline"] = None if old is None else compare_audits(old, document, str(baseline))
        return AuditResult(path, document, _write(path / FOLDER, document, options), options.strict)


def _resume(path: Path, options: AuditOptions, baseline: str | Path | None) -> str:
    """The command that goes on with an audit."""
    old = "" if baseline is None else f" --baseline {baseline}"
    return f"mismatch-probe audit --resume {path}{options.flags()}{old}"


def _known_refusals(run: RunDirectory) -> dict[str, str]:
    """What an earlier audit of the run knew of the engine's refusals."""
    return {} if run.manifest.audit is None else run.manifest.audit.unsupported


def _remember(run: RunDirectory, options: AuditOptions, refused: Mapping[str, str]) -> None:
    """Keeps with the run what its audit was asked for."""
    run.manifest.audit = AuditRecord(options=options.as_dict(), unsupported=dict(refused))
    run.save()


def _options(run: RunDirectory, given: Mapping[str, Any]) -> AuditOptions:
    """What is given, and of what decides about measurements an earlier audit's where it is not."""
    kept = {} if run.manifest.audit is None else run.manifest.audit.options
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items() if name in _KEPT}
    return AuditOptions(**{**found, **given})


def _check(options: AuditOptions, baseline: str | Path | None) -> tuple[Profile, dict[str, Any] | None]:
    return load_profile(options.profile), None if baseline is None else read_audit(baseline)


def _write(folder: Path, document: dict[str, Any], options: AuditOptions) -> dict[str, Path]:
    from mismatch_probe.report.audit_page import render_audit
    from mismatch_probe.report.figures.audit import draw_audit

    write_json(folder / "audit.json", document)
    write_text(folder / "junit.xml", junit_xml(document, strict=options.strict))
    figures = draw_audit(document, folder / "figures")
    write_text(folder / "report.html", render_audit(document, figures))
    return figures


def _refused(config: CompareConfig) -> dict[str, str]:
    """By rollout dtype that vLLM is known to refuse for the model, the sentence; read without loading anything."""
    if config.source is not None and not config.model:
        return {}
    known = resolve(config.model or DEFAULT_MODEL, revision=config.revision, weights=False)
    return {dtype: why for dtype in config.rollout_dtypes if (why := refusal(known.config, dtype))}
