"""One attribution from beginning to end: comparison, passes, document, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.config import AttributeOptions, CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.errors import UsageError
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.probes.attribute.attribution import attribution_of
from mismatch_probe.probes.attribute.evidence import Evidence
from mismatch_probe.probes.attribute.measure import make_missing
from mismatch_probe.probes.attribute.names import FOLDER
from mismatch_probe.probes.attribute.pair import Pair, open_pair
from mismatch_probe.probes.attribute.store import PassStore
from mismatch_probe.probes.planning import make_plan
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import KEPT, Session, write_run
from mismatch_probe.report.attribution import attribution_report
from mismatch_probe.report.figures import draw
from mismatch_probe.report.model import Report
from mismatch_probe.report.render.files import write_report
from mismatch_probe.results.attribution import Attribution
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import continued_by


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
    progress, asked = progress or Progress(), AttributeOptions(**options)
    with Session.new(make_plan(config_of(config, asked), progress), out, progress) as session:
        return _attribute(session, asked, again=False)


def resume_attribution(path: Path, options: Mapping[str, Any], progress: Progress | None) -> AttributeResult:
    """Makes what is missing of a run, of the comparison and of the attribution.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
        ProbeError: An engine failed.
    """
    with Session.resume(path, progress or Progress()) as session:
        return _attribute(session, _options(session.run, options), again=True)


def attribute_again(path: Path, options: Mapping[str, Any]) -> AttributeResult:
    """Computes the document again, without an engine.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    with RunDirectory.reopened(path) as run:
        pair = open_pair(run, asked := _options(run, options))
        return _write(pair, PassStore(pair, asked))


def config_of(config: CompareConfig, options: AttributeOptions) -> CompareConfig:
    """The comparison that an attribution begins with: the pair, and the trainer in FP32 beside it."""
    if len(config.trainer_modes) > 1:
        raise UsageError("An attribution takes one pair apart, so it needs one --trainer-mode.", "Name one of the two.")
    rollout, trainer = options.dtypes
    trainers = tuple(dict.fromkeys((trainer, "float32")))
    return config.replace(rollout_dtypes=(rollout,), trainer_dtypes=trainers)


def _attribute(session: Session, options: AttributeOptions, *, again: bool) -> AttributeResult:
    run = session.run
    with continued_by(f"mismatch-probe attribute --resume {run.path}", KEPT):
        _check_device(run)
        if not session.complete:
            _remember(run, options)
            session.run_passes()
        pair = open_pair(run, options)
        store = PassStore(pair, options)
        _remember(run, options)
        make_missing(store, pair, options, session.progress, again=again)
    session.progress.message("computing contributions and figures")
    result = _write(pair, store)
    write_run(analyse(run))  # the comparison's report quotes the answer
    return result


def _remember(run: RunDirectory, options: AttributeOptions) -> None:
    """Keeps with the run what its attribution was asked for."""
    run.manifest.attribution = options.model_dump(mode="json")
    run.save()


def _write(pair: Pair, store: PassStore) -> AttributeResult:
    """The document, and what is shown of it."""
    path, folder = pair.run.path, pair.run.path / FOLDER
    found = attribution_of(Evidence(pair, store, store.load()))
    found.write(folder / "attribution.json")
    result = AttributeResult(path, found, draw(found, folder / "figures"))
    write_report(result.report(), result.figures, folder)
    return result


def _check_device(run: RunDirectory) -> None:
    """Raises:
    UsageError: The run's engines ran on a device that is not here, where passes would differ by the device, too.
    """
    if run.manifest.device == "cuda" and not devices.gpu_present():
        raise UsageError("This run began on cuda, and this machine has no GPU.", "Use --from, or continue it there.")


def _options(run: RunDirectory, given: Mapping[str, Any]) -> AttributeOptions:
    """What is given, and an earlier attribution's where it is not."""
    return AttributeOptions(**{**(run.manifest.attribution or {}), **given})
