"""One attribution from beginning to end: comparison, passes, document, report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mismatch_probe.config import AttributeOptions, CompareConfig
from mismatch_probe.engines import devices
from mismatch_probe.errors import Interrupted, UsageError
from mismatch_probe.files import locked
from mismatch_probe.probes.attribute.attribution import attribution_of
from mismatch_probe.probes.attribute.evidence import Evidence
from mismatch_probe.probes.attribute.measure import make_missing
from mismatch_probe.probes.attribute.names import FOLDER
from mismatch_probe.probes.attribute.pair import open_pair
from mismatch_probe.probes.attribute.store import PassStore
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import new_passes, report_run, resume_run
from mismatch_probe.report.attribution import attribution_report
from mismatch_probe.report.figures import draw
from mismatch_probe.report.model import Report
from mismatch_probe.report.render.files import write_report
from mismatch_probe.results.attribution import Attribution
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.folder import default_folder


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
    config = config_of(config, asked)
    path = Path(out) if out is not None else default_folder(config.model)
    try:
        new_passes(config, path, progress)
    except Interrupted as error:
        raise Interrupted(error.what, f"Continue with: {_resume(path, asked)}") from None
    return _finish(path, asked, progress, engines=True)


def resume_attribution(path: Path, options: Mapping[str, Any], progress: Progress | None) -> AttributeResult:
    """Makes what is missing of a run, of the comparison and of the attribution.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
        ProbeError: An engine failed.
    """
    progress = progress or Progress()
    asked = _options(RunDirectory.open(path), options)
    if RunDirectory.open(path).manifest.status != "complete":
        try:
            resume_run(path, (), progress, {})
        except Interrupted as error:
            raise Interrupted(error.what, f"Continue with: {_resume(path, asked)}") from None
    return _finish(path, asked, progress, engines=True, again=True)


def attribute_again(path: Path, options: Mapping[str, Any]) -> AttributeResult:
    """Computes the document again, without an engine.

    Raises:
        TableError: The folder holds no run, or a table is missing or corrupt.
    """
    return _finish(path, _options(RunDirectory.open(path), options), Progress(), engines=False)


def config_of(config: CompareConfig, options: AttributeOptions) -> CompareConfig:
    """The comparison that an attribution begins with: the pair, and the trainer in FP32 beside it."""
    if len(config.trainer_modes) > 1:
        raise UsageError("An attribution takes one pair apart, so it needs one --trainer-mode.", "Name one of the two.")
    rollout, trainer = options.dtypes
    trainers = tuple(dict.fromkeys((trainer, "float32")))
    return config.replace(rollout_dtypes=(rollout,), trainer_dtypes=trainers)


def _finish(
    path: Path, options: AttributeOptions, progress: Progress, *, engines: bool, again: bool = False
) -> AttributeResult:
    with locked(path):
        run = RunDirectory.open(path)
        pair = open_pair(run, options)
        store = PassStore(pair, options)
        if engines:
            _check_device(run)
            run.manifest.attribution = options.model_dump(mode="json")
            run.save()
            make_missing(store, pair, options, progress, _resume(path, options), again=again)
            progress.message("computing contributions and figures")
        found = attribution_of(Evidence(pair, store, store.load()))
        found.write(path / FOLDER / "attribution.json")
        result = AttributeResult(path, found, draw(found, path / FOLDER / "figures"))
        write_report(result.report(), result.figures, path / FOLDER)
        if engines:
            report_run(path, (), None, None)  # the comparison's report quotes the answer
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


def _resume(path: Path, options: AttributeOptions) -> str:
    """The command that goes on; a run remembers its options only once its comparison is finished."""
    return shlex.join(["mismatch-probe", "attribute", "--resume", str(path), *options.arguments()])
