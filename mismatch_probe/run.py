"""A comparison in its folder, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

if TYPE_CHECKING:
    import pandas as pd

    from mismatch_probe.keywords import AttributeOptionKeywords, AuditOptionKeywords, CompareKeywords
    from mismatch_probe.probes.attribute.session import AttributeResult
    from mismatch_probe.probes.audit.session import AuditResult
    from mismatch_probe.probes.comparison import RunResult
    from mismatch_probe.probes.gradient.session import GradientResult
    from mismatch_probe.probes.progress import Progress
    from mismatch_probe.report.data import ReportData
    from mismatch_probe.report.model import TokenSequence
    from mismatch_probe.results.comparison import Comparison


class Run:
    """A comparison. `mismatch_probe.compare` makes one, `Run.open` takes one that is there.

    Attributes:
        path: Its folder.
    """

    def __init__(self, found: RunResult | Path) -> None:
        self._result = None if isinstance(found, Path) else found
        self.path = found if isinstance(found, Path) else found.path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run that is there.

        Raises:
            TableError: The folder holds no comparison.
        """
        from mismatch_probe.runs.comparison import RunDirectory

        return cls(RunDirectory.open(Path(path)).path)

    @property
    def result(self) -> RunResult:
        """What was computed; of an opened run it is computed from the tables.

        Raises:
            TableError: A table is missing or corrupt.
        """
        if self._result is None:
            self._result = self.report().result
        return self._result

    @property
    def summary(self) -> Comparison:
        """Content of `summary.json`."""
        return self.result.summary

    @property
    def data(self) -> ReportData:
        """Everything that its report shows."""
        return self.result.data

    @property
    def figures(self) -> Mapping[str, Path]:
        """Figure files by name."""
        return self.result.figures

    @property
    def complete(self) -> bool:
        """Whether every pass that can run here has run."""
        return self.result.complete

    @property
    def exceeded(self) -> bool:
        """Whether a limit of `fail_on` is exceeded, or inconclusive."""
        return self.result.exceeded

    def frame(self) -> pd.DataFrame:
        """A row per pair and metric, as in `summary.csv`."""
        return self.result.frame()

    def resume(
        self,
        *,
        fail_on: str | Sequence[str] = (),
        progress: Progress | None = None,
        **changes: Unpack[CompareKeywords],
    ) -> Run:
        """Runs the passes that are missing.

        Args:
            fail_on: Limits, as in `compare`.
            progress: Told about every pass.
            changes: Settings that may still change: `memory_budget_gib`, `predict_lengths`, `extrapolate` and
                `ratio_limits` at any time, the trainer's layout and attention until a trainer pass is finished, the
                rollout engine's batch, arguments, `eager` and `exact_kl` until a rollout pass is.

        Raises:
            ProbeError: The model or the prompts have changed, or a change comes too late.
        """
        from mismatch_probe.config.compare import GateSettings
        from mismatch_probe.probes.comparison import resume_run

        return Run(resume_run(self.path, GateSettings.of({"fail_on": fail_on}).fail_on, progress, changes))

    def report(
        self,
        *,
        fail_on: str | Sequence[str] = (),
        predict_lengths: Sequence[int] | None = None,
        extrapolate: bool | None = None,
        ratio_limits: Sequence[float] | None = None,
    ) -> Run:
        """Computes summary, figures and reports again, without an engine: the command `report`.

        Args:
            fail_on: Limits, as in `compare`.
            predict_lengths: Response lengths to predict; those of the run's settings for None.
            extrapolate: Whether to predict beyond 8 times the observed length; likewise.
            ratio_limits: Factors of `frac_ratio_beyond_<factor>` beside the fixed 2; likewise.

        Raises:
            TableError: A table is missing or corrupt.
        """
        from mismatch_probe.config.commands import ReportSettings
        from mismatch_probe.probes.comparison import report_run

        given = {"fail_on": fail_on, "predict_lengths": predict_lengths or (), "ratio_limits": ratio_limits or ()}
        asked = ReportSettings.of(given)
        lengths, limits = asked.predict_lengths or None, asked.ratio_limits or None
        return Run(report_run(self.path, asked.fail_on, lengths, extrapolate, limits))

    def plot(self) -> dict[str, Path]:
        """Draws the figures again, without an engine: the command `plot`.

        Raises:
            TableError: A table is missing or corrupt.
        """
        from mismatch_probe.probes.comparison import plot_run

        return plot_run(self.path)

    def tokens(self, sequence_id: int) -> tuple[TokenSequence, ...]:
        """The tokens of one sequence with log μ, log π, entropy and rank, in every pair of equal dtypes that has it.

        Raises:
            UsageError: No compared pair has the sequence.
            TableError: A table is missing or corrupt.
        """
        from mismatch_probe.probes.analysis import tokens_of
        from mismatch_probe.runs.comparison import RunDirectory

        return tokens_of(RunDirectory.open(self.path), sequence_id)

    def attribute(
        self, *, engines: bool = True, progress: Progress | None = None, **options: Unpack[AttributeOptionKeywords]
    ) -> AttributeResult:
        """Attributes the gap of one pair.

        Args:
            engines: Whether to run what is missing; False computes from what is there.
            progress: Told about every pass.
            options: Options of an attribution; what is left out is as the last one of the run had it.

        Raises:
            TableError: A table is missing or corrupt.
            ProbeError: An engine failed.
        """
        from mismatch_probe.probes.attribute.session import attribute_again, resume_attribution

        if engines:
            return resume_attribution(self.path, options, progress)
        return attribute_again(self.path, options)

    def audit(
        self,
        *,
        engines: bool = True,
        baseline: str | Path | None = None,
        progress: Progress | None = None,
        **options: Unpack[AuditOptionKeywords],
    ) -> AuditResult:
        """Judges the run.

        Args:
            engines: Whether to run what is missing; False judges what is there, and says what is missing.
            baseline: An earlier `audit.json`, or the folder of its run, to compare with.
            progress: Told about every pass.
            options: Options of an audit; profile, lengths and rates that are left out are those of its last audit.

        Raises:
            TableError: A table is missing or corrupt.
            ProbeError: The model has changed, or an engine failed.
        """
        from mismatch_probe.probes.audit.session import audit_run, resume_audit

        if engines:
            return resume_audit(self.path, options, baseline, progress)
        return audit_run(self.path, options, baseline)

    def gradient(
        self, *, engines: bool = True, predict_lengths: Sequence[int] = (), progress: Progress | None = None
    ) -> GradientResult:
        """Measures what the mismatch does to the policy gradient of the batch.

        Args:
            engines: Whether to run missing passes of the comparison; False adds the gradient pass alone.
            predict_lengths: Response lengths at which ESS is predicted; by default those of the run.
            progress: Told about every pass.

        Raises:
            ProbeError: The run has no FP32 trainer pass, its model has changed, or the engine failed.
        """
        from mismatch_probe.config import GradientOptions
        from mismatch_probe.probes.gradient.session import resume_gradient

        lengths = GradientOptions.of({"predict_lengths": predict_lengths}).predict_lengths
        return resume_gradient(self.path, lengths, progress, passes=engines)
