"""A sweep of RL runs: what was planned, how each arm did, and what tells arms apart. The file is `sweep.json`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import JsonValue

from mismatch_probe.metrics.arms import ArmComparison
from mismatch_probe.metrics.dose import DoseResponse
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.rl_run import Provenance
from mismatch_probe.types import MetricValue


class SweepRun(Result):
    """A planned run: one arm with one seed."""

    name: str
    """Of its folder in `runs/`."""
    arm: str
    """The name without the seed."""
    config: dict[str, JsonValue]
    """Every setting of the run, see `rl.config.RlConfig`."""


class ArmResult(Result):
    """Runs that differ in their seed alone, as means over those that have ended, with 95 % intervals over seeds."""

    arm: str
    """Its name, as in `runs.parquet`."""
    label: str
    """The settings in which arms of this sweep differ, e.g. `BF16, weight-noise 0.2`."""
    family: str
    """The label of the same arm without stress."""
    precision: str
    """Rollout dtype where no stress is injected and the trainer has the same dtype; else empty."""
    structure: str
    """Kind of injected stress, or `none`."""
    dose: float
    """Size of the injected stress, 0 without it."""
    remedy: str = "none"
    """What takes mismatch away at its source, or `none`."""
    n_runs: int
    """Runs that have ended."""
    n_collapsed: int
    """Those that collapsed."""
    n_diverged: int
    """Those that diverged."""
    ess_seq: MetricValue
    """ESS of a step's sequences over their number, first window of steps, staleness included."""
    mean_abs_logprob_diff: MetricValue
    """Mean |Δ log-prob| of a token, first window of steps, staleness included; nats."""
    reward: MetricValue
    """Mean reward of the sampled policy, last window of steps; a diverged run counts as 0."""
    clean_reward: MetricValue
    """Mean reward of the final weights in FP32 without stress; a diverged run counts as 0."""
    reward_kept: MetricValue
    """Reward of the last window over that of the best window; a diverged run counts as 0."""

    @property
    def n_lost(self) -> int:
        """Runs that collapsed or diverged."""
        return self.n_collapsed + self.n_diverged


class Place(Result):
    """A compared model at a response length, on the axes of the dose response."""

    label: str
    """Model, precision and length."""
    dtype: str
    """Of both sides."""
    predicted_ess: MetricValue
    """ESS of the sequences over their number, predicted for that length."""
    ess_seq: MetricValue
    """What the sequences of one step of the sweep would show of it: the quantity of `ArmResult.ess_seq`."""
    mean_abs_logprob_diff: MetricValue
    """Measured in the comparison, nats."""


class SweepSummary(Result):
    """What the runs that have ended show."""

    window: int
    """Steps of the first and of the last window."""
    n_sequences: int
    """Sequences of a step."""
    max_tokens: int
    """Response budget, tokens."""
    n_planned: int
    """Planned runs."""
    n_ended: int
    """Runs that have ended."""
    failures: dict[str, str]
    """Why runs failed, by run."""
    arms: tuple[ArmResult, ...]
    """In the order of the plan."""
    comparisons: tuple[ArmComparison, ...]
    """Every arm against its reference, see `rl.sweep_summary.against_reference`."""
    dose_response: DoseResponse | None
    """How the final reward follows the measured mismatch; None without injected stress."""
    places: tuple[Place, ...]
    """Models of comparisons among the arms."""


class RlSweep(Document):
    """The document of a sweep; written when it starts, and again with what its runs show."""

    KIND: ClassVar[str] = "sweep"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe rl sweep"

    runs: tuple[SweepRun, ...]
    """What was planned, by seed first."""
    provenance: Provenance
    """When, where and from what it was started."""
    summary: SweepSummary | None = None
    """What its runs show; None until it was reported."""
    findings: tuple[Finding, ...] = ()
    """Statements about the sweep, the most important ones first."""
