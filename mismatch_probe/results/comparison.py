"""What a comparison found: `summary.json`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mismatch_probe.metrics.chunks import ExcludedValue
from mismatch_probe.metrics.curves import WhereBin
from mismatch_probe.metrics.exact import EstimatorCost
from mismatch_probe.metrics.groups import STEP, GroupResult
from mismatch_probe.metrics.length_prediction import LengthPrediction
from mismatch_probe.metrics.paired import PairedComparison
from mismatch_probe.metrics.power import PromptsNeeded
from mismatch_probe.metrics.ratio_test import RatioTest
from mismatch_probe.metrics.self_noise import SelfNoise
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

LimitVerdict = Literal["ok", "fail", "inconclusive"]


class PairName(Result):
    """A rollout pass and a trainer pass."""

    rollout_pass: str
    """Id of the rollout pass, e.g. `vllm-bfloat16-decode`."""
    trainer_pass: str
    """Id of the trainer pass, e.g. `hf-bfloat16-cast`."""
    rollout_dtype: str
    """Dtype of the rollout, `recorded` for what a file brought."""
    trainer_dtype: str
    """Dtype of the trainer, `recorded` for what a file brought."""
    trainer_mode: str
    """`cast`, `autocast` or `recorded`."""


class SelfNoisePass(Result):
    """An engine against itself: a pass, and a second run of some of its tokens."""

    pass_id: str
    """The pass."""
    self_noise_pass: str
    """The pass that repeats it."""
    engine: str
    """`vllm` or `hf`."""
    dtype: str
    """Dtype of both."""
    measured: SelfNoise
    """How far the two are apart."""


class PairSelfNoise(Result):
    """Self-noise of both sides of a pair; None for a side that was not run twice."""

    rollout: SelfNoisePass | None = None
    """Of the rollout."""
    trainer: SelfNoisePass | None = None
    """Of the trainer."""

    @property
    def mean_abs(self) -> float | None:
        """Mean |d| of an engine against itself, nats: the larger side; None where neither was measured."""
        sides = (side.measured.mean_abs_logprob_diff for side in (self.rollout, self.trainer) if side is not None)
        return max((value for value in sides if value is not None), default=None)


class Pair(PairName):
    """A rollout pass and a trainer pass over the same tokens."""

    on_policy: bool
    """Whether the rollout pass sampled these tokens."""
    n_tokens: int
    """Response tokens."""
    n_sequences: int
    """Sequences."""
    n_prompts: int
    """Prompts, the unit of every interval."""
    n_prompts_usable: int
    """Prompts with a usable token."""
    n_nonfinite: int
    """Tokens whose log-prob is NaN or infinite on either side."""
    n_excluded: int
    """Tokens that no metric counts: those, and values that cannot be log-probs."""
    excluded: tuple[ExcludedValue, ...]
    """What those tokens have in place of a log-prob."""
    mean_abs_logprob_diff_all_finite: float | None
    """Mean |d|, nats, with the finite ones of the excluded tokens; None where there are none."""
    n_nonfinite_exact: int = 0
    """Compared positions at which KL(μ‖π) is infinite or not a number."""
    metrics: dict[str, MetricValue]
    """By key of the catalogue."""
    budget: dict[str, MetricValue] | None = None
    """The error budget, RMS in nats: `rollout_error_rms`, `trainer_error_rms`, `predicted_gap_rms`, `measured_gap_rms`;
    `error_correlation` and `measured_over_predicted` have no unit. None without a reference."""
    estimators: tuple[EstimatorCost, ...] | None = None
    """What sampled estimators of KL(μ‖π) cost on this pair; None where no rows of logits were compared."""
    ratio_tests: tuple[RatioTest, ...] = ()
    """Whether the mean importance ratio is 1; empty off policy, where it need not be."""
    prompts_needed: dict[str, PromptsNeeded] = {}
    """How many more prompts a few metrics need for ±5 %, by key; pairs of equal dtypes only."""
    groups: tuple[GroupResult, ...] = ()
    """Metrics of parts of the pair: by `step`, where recorded sequences name their training step."""
    self_noise: PairSelfNoise = PairSelfNoise()
    """Each side against itself."""


class MissingPair(PairName):
    """A pair that could not be compared."""

    why: str
    """Why not."""


class Crossing(Result):
    """Where an effective sample size is predicted to fall below a threshold."""

    ess_seq: float
    """The threshold."""
    length: MetricValue
    """Response length, tokens. A limit beyond the furthest prediction is None."""


class LengthGrowth(Result):
    """How D, the log-ratio of a whole response, grows with length, and what that predicts. Of one on-policy pair."""

    observed_length: int
    """Longest length, tokens, that enough prompts reach; 0 if none."""
    n_sequences: int
    """Sequences that reach it: the sample of the fit."""
    n_prompts: int
    """Their prompts."""
    n_cut: int
    """Sequences that were cut before an unusable token."""
    variance_exponent: MetricValue
    """γ of Var D ~ L^γ: 1 a random walk, 2 persistent."""
    variance_ratio: MetricValue
    """Var D at the observed length over that of a random walk with the same tokens."""
    seq_log_ratio_mean: MetricValue
    """Mean D at the observed length, nats."""
    model_weight: dict[str, float]
    """Weight of each growth law in the prediction; empty where there is none."""
    trend_weight: float | None
    """Weight of a trend of the mean; None where nothing is predicted."""
    contradicted: dict[str, str]
    """By predicted key, the measured value that the model of growth does not hold."""
    why: str
    """Why nothing is predicted, or what limits it."""
    predictions: tuple[LengthPrediction, ...]
    """At the lengths that were asked for."""
    crossings: tuple[Crossing, ...]
    """Where ESS falls below 0.5 and 0.1."""


class LimitCheck(PairName):
    """A `--fail-on` limit at one pair."""

    limit: str
    """As it was given."""
    value: float | None
    """The metric's value; None where there is none."""
    verdict: LimitVerdict
    """`inconclusive` where there is no value, or tokens are excluded; the exit code treats it as `fail`."""
    why: str
    """What limits the value."""


class Comparison(Document):
    """`summary.json` of a run folder."""

    KIND: ClassVar[str] = "comparison"
    VERSION: ClassVar[int] = 3
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe report {folder}"

    model: str
    """The model's name."""
    reference: str | None
    """The pass that errors are charged against; None where there is none."""
    pairs: tuple[Pair, ...]
    """Every pair that was compared, by rollout pass, then trainer pass."""
    missing: tuple[MissingPair, ...] = ()
    """Every pair that could not be compared."""
    beside: tuple[Pair, ...] = ()
    """What else a dump brought, outside the matrix: the engine against its own prefill, the trainer against its update
    pass, the rollout against the reference model."""
    self_noise: tuple[SelfNoisePass, ...] = ()
    """Every pass that was run twice."""
    where: dict[str, dict[str, tuple[WhereBin, ...]]] = {}
    """By pair of equal dtypes and token property (`probability`, `entropy`, `rank`, `position`, `token_kind`): where
    the gap lies."""
    comparisons: tuple[PairedComparison, ...] = ()
    """Ratios of metrics of every two pairs of equal dtypes, paired by prompt."""
    length: dict[str, LengthGrowth] = {}
    """By pair of equal dtypes that is on policy: what longer responses do."""
    findings: tuple[Finding, ...] = ()
    """What follows from the numbers, the most important first."""
    limits: tuple[LimitCheck, ...] = ()
    """The limits of `--fail-on`, at every pair that they apply to."""

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any]:
        """Schema 2 knew one kind of group: steps, by their number."""
        if version != 2:
            return super().upgrade(raw, version)
        pairs = raw.get("pairs")
        return {**raw, "pairs": [_with_groups(pair) for pair in pairs]} if isinstance(pairs, list) else raw


def _with_groups(pair: Any) -> Any:
    """What is no pair of schema 2 stays as it is and is refused with the name of its field."""
    steps = pair.get("steps", []) if isinstance(pair, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "step" in step for step in steps):
        return pair
    rest = {name: value for name, value in pair.items() if name != "steps"}
    groups = [{"key": STEP, "label": str(step["step"]), **step} for step in steps]
    return {**rest, "groups": [{k: v for k, v in group.items() if k != "step"} for group in groups]}
