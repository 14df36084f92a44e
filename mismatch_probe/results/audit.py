"""The document of an audit: verdicts with the checks behind them, and what was measured on the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from mismatch_probe.config import CompareConfig
from mismatch_probe.metrics.corrections import Correction
from mismatch_probe.metrics.floats import NO_SCALE, ScaleRange, ScalerTrace
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.manifest import Environment
from mismatch_probe.types import MetricValue

Level = Literal["ok", "warn", "fail"]
Verdict = Literal["ok", "warn", "fail", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("fail", "inconclusive", "warn", "ok")
"""The worst first."""
PartName = Literal["weights", "forward", "backward", "lag", "proof"]
PARTS: tuple[PartName, ...] = ("weights", "forward", "backward", "lag", "proof")
"""What is measured on the model itself, in the order in which it is measured."""


class Bounds(Result):
    """When a check warns and fails, and who says so."""

    warn_above: float | None = None
    """Limit of the value, in the value's unit."""
    fail_above: float | None = None
    """Limit of the value, in the value's unit."""
    warn_below: float | None = None
    """Limit of the value, in the value's unit."""
    fail_below: float | None = None
    """Limit of the value, in the value's unit."""
    event: Literal["warn", "fail"] | None = None
    """Of a rare event: what one occurrence is."""
    rate_below: float | None = Field(default=None, gt=0)
    """Of a rare event that did not occur, and of a maximum within its limits: the upper 95 % limit of the fraction of
    prompts that would show it has to be below this, or the check is inconclusive. Without it such a check is never ok.
    """
    within: float | None = Field(default=None, gt=0)
    """Of `one_sided`: the interval of the mean importance ratio has to lie within 1 ± this, or the check is
    inconclusive."""
    source: str = ""
    """Who set the limits."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.limits and self.event is None:
            raise ValueError("names no limit")
        for warn, fail, order in (("warn_above", "fail_above", 1), ("warn_below", "fail_below", -1)):
            first, second = getattr(self, warn), getattr(self, fail)
            if first is not None and second is not None and order * (second - first) < 0:
                raise ValueError(f"{warn} = {first:g} would never warn before {fail} = {second:g}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the value that there are, by name."""
        names = ("warn_above", "fail_above", "warn_below", "fail_below")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Settle(Result):
    """What would settle an inconclusive check. All fields are empty where nothing is known to."""

    more_prompts: int | None = None
    """Further prompts of the same kind that settle it if the value stays, to two digits upwards."""
    max_tokens: int | None = None
    """Response length that has to be sampled, tokens."""
    parts: tuple[PartName, ...] = ()
    """Measurements on the model that have to be made."""
    dtypes: tuple[str, ...] = ()
    """Dtypes that both sides have to run in, too."""
    trainer_modes: tuple[str, ...] = ()
    """Trainer modes that have to be run."""
    unknown: tuple[str, ...] = ()
    """Names of checks that none of this settles."""

    @classmethod
    def all_of(cls, needs: Iterable[Settle]) -> Settle:
        """What settles all of them together."""
        found = list(needs)
        return cls(
            more_prompts=max((n.more_prompts for n in found if n.more_prompts is not None), default=None),
            max_tokens=max((n.max_tokens for n in found if n.max_tokens is not None), default=None),
            parts=tuple(part for part in PARTS if any(part in n.parts for n in found)),
            dtypes=tuple(dict.fromkeys(name for n in found for name in n.dtypes)),
            trainer_modes=tuple(dict.fromkeys(name for n in found for name in n.trainer_modes)),
            unknown=tuple(dict.fromkeys(name for n in found for name in n.unknown)),
        )


class Check(Result):
    """One check of a precision pair. It is judged by its whole interval, or by the prompts that were seen."""

    name: str
    """A metric of the catalogue, or a check of the audit's own, e.g. `"fp16_headroom"`."""
    verdict: Verdict
    """`best` where that is `worst`, else `inconclusive`."""
    best: Level
    """The better of the verdicts that the data leave open."""
    worst: Level
    """The worse of them."""
    value: MetricValue
    """What was measured, in the metric's unit; None where nothing was, then `why` says so."""
    exact: bool
    """Whether the value was counted or computed over all there is, so that it needs no interval."""
    bounds: Bounds
    """Its limits."""
    finding: Finding
    """The evidence; `where` names the tensor that decides."""
    settle: Settle | None
    """What would settle it; None where it is not inconclusive."""


class PrecisionPair(Result):
    """A precision pair."""

    rollout_dtype: str
    """Dtype of the rollout engine; `recorded` for log-probs that a file brought."""
    trainer_dtype: str
    """Dtype of the trainer; `recorded` likewise."""
    trainer_mode: str
    """`cast`, `autocast` or `recorded`; empty for a pair that was not compared."""

    @property
    def dtypes(self) -> tuple[str, str]:
        """Rollout and trainer dtype."""
        return self.rollout_dtype, self.trainer_dtype

    @property
    def key(self) -> tuple[str, str, str]:
        """Names the pair."""
        return self.rollout_dtype, self.trainer_dtype, self.trainer_mode


class AuditedPair(PrecisionPair):
    """A precision pair with its checks."""

    n_tokens: int
    """Response tokens that were compared; 0 where the pair could not run."""
    n_prompts: int
    """Prompts that they answer."""
    verdict: Verdict
    """Fail where a check fails, inconclusive where one may, warn where one warns or may, else ok."""
    mean_abs_logprob_diff: MetricValue
    """Mean |d|, nats."""
    checks: tuple[Check, ...]
    """In the profile's order."""

    @property
    def name(self) -> PrecisionPair:
        """The pair alone."""
        return PrecisionPair(
            rollout_dtype=self.rollout_dtype, trainer_dtype=self.trainer_dtype, trainer_mode=self.trainer_mode
        )

    def check(self, name: str) -> Check | None:
        """A check by its name."""
        return next((check for check in self.checks if check.name == name), None)


class Answer(PrecisionPair):
    """What the audit says of one precision."""

    compared: bool
    """Whether there are checks of this pair."""
    decides: bool
    """Whether the verdict of the whole audit is of this pair."""
    verdict: Verdict
    """Of the pair; inconclusive where it was not compared."""
    check: str
    """The check that decides; empty where all are ok or the pair was not compared."""
    finding: Finding
    """The evidence that decides."""
    also: tuple[str, ...]
    """Other checks that would give the same verdict alone."""
    settle: Settle | None
    """What would settle the checks that are open and decide; None where none is."""


class Peak(Result):
    """Largest |activation| of a tensor over a token's channels, in FP32. Values that are not finite are counted and
    left out."""

    name: str
    """Module, with what of it in parentheses where it is not its output."""
    kind: str
    """`residual`, `mlp product`, `router logits`, `logits`, `softmax input`, `attention product` or `other`."""
    layer: int | None
    """Index of the decoder layer, None outside of them."""
    peak: float
    """The largest of any token."""
    first_token_peak: float
    """The largest of a sequence's first token, where attention sinks are."""
    rest_peak: float
    """The largest of all other tokens."""
    rest_median: float
    """Median over other tokens."""
    rest_p99: float
    """99 % quantile over other tokens."""
    rest_p999: float
    """99.9 % quantile over other tokens."""
    n_overflow: int
    """Tokens whose peak FP16 rounds to infinity."""
    n_nonfinite: int
    """Tokens whose peak is not finite in FP32."""
    sequence: int
    """Index of the sequence with the largest peak."""
    position: int | None
    """Position of the largest peak in it; None where peaks belong to no token."""


class KindPeak(Peak):
    """The largest peak of a kind of tensor."""

    overflows_in: tuple[str, ...]
    """Dtypes that have no number for it."""


class LayerPeaks(Result):
    """Peaks of the residual stream in a decoder layer."""

    layer: int
    """Index of the layer."""
    first_token_peak: float
    """The largest of a sequence's first token."""
    rest_peak: float
    """The largest of all other tokens."""
    rest_median: float
    """Median over other tokens."""
    rest_p999: float
    """99.9 % quantile over other tokens."""


class ContextPeaks(Result):
    """Peaks at positions of an octave."""

    first: int
    """First position, from 0."""
    last: int
    """Last position."""
    peak: float
    """The largest of any tensor that FP16 would hold."""
    residual: float
    """The largest of the residual stream."""


class Activations(Result):
    """Range of activations in an FP32 forward pass."""

    n_sequences: int
    """Sequences that ran."""
    n_prompts: int
    """Prompts that they answer: the unit of every statement on what was not seen."""
    n_tokens: int
    """Tokens, prompts included."""
    longest: int
    """Longest context, tokens; nothing is known beyond it."""
    fused_attention: bool
    """Whether attention keeps products q·k and softmax inputs in FP32; then they do not count as overflows."""
    overflow_rate: MetricValue
    """Fraction of tokens with an activation that FP16 rounds to infinity; where none has, the interval is that of the
    fraction of prompts."""
    n_overflow: int
    """Tokens with such an activation."""
    n_overflow_prompts: int
    """Prompts with such a token."""
    largest: Peak
    """The largest peak among tensors that FP16 would hold."""
    source: str
    """The first tensor with at least half of the largest peak."""
    first_overflow: str | None
    """The first tensor that FP16 has no number for, None where it holds all."""
    first_nonfinite: str | None
    """The first tensor that is not finite in FP32, None where all are."""
    kinds: dict[str, KindPeak]
    """The largest peak of each kind."""
    residual_by_layer: tuple[LayerPeaks, ...]
    """The residual stream by decoder layer."""
    by_context: tuple[ContextPeaks, ...]
    """By octave of context length."""
    tensors: tuple[Peak, ...]
    """In the order in which a forward pass makes them."""


class WeightRounding(Result):
    """What conversion to a 16-bit dtype does to a weight tensor."""

    name: str
    """The parameter."""
    dtype: str
    """What it is converted to."""
    n: int
    """Weights."""
    ndim: int
    """Dimensions of the tensor."""
    error: float
    """‖w − round(w)‖ / ‖w‖ over weights that stay finite."""
    largest: float
    """max |w| of the finite ones."""
    n_nonfinite: int
    """Weights that are not finite to begin with."""
    n_overflow: int
    """Weights that become infinite."""
    n_flushed: int
    """Weights that become 0."""
    n_subnormal: int
    """Weights that lose digits below the smallest normal number."""


class WeightTotals(Result):
    """Conversion of all weights to a 16-bit dtype."""

    worst: WeightRounding
    """The tensor that is kept worst: not finite, else the matrix with the largest error."""
    n_nonfinite: int
    """Weights that are not finite to begin with."""
    n_overflow: int
    """Weights that become infinite."""
    n_flushed: int
    """Weights that become 0."""
    n_subnormal: int
    """Weights that lose digits below the smallest normal number."""
    n: int
    """Weights."""


class Weights(Result):
    """Conversion of weights to 16 bits."""

    float16: WeightTotals
    """To FP16."""
    bfloat16: WeightTotals
    """To BF16."""
    tensors: tuple[WeightRounding, ...]
    """Every tensor in both dtypes."""


class GradientTensor(Result):
    """Gradients of a tensor, without a loss scale."""

    name: str
    """The parameter, or a module's output with ` (activation)`."""
    largest: float
    """max |g| of the finite ones."""
    n_nonfinite: int
    """Elements that are not finite."""
    flushed_unscaled: float
    """Fraction of Σ|g| that FP16 turns into 0."""
    scale_low: int | None
    """Exponent of the smallest loss scale that loses no more than is allowed; None without a gradient."""
    scale_high: int | None
    """Exponent of the largest loss scale that overflows nothing; None without a gradient."""


class Gradients(Result):
    """Range of gradients of −Σ A log π / N over response tokens, A = ±1, one sequence at a time, in FP32."""

    step_tokens: int
    """N: response tokens that a step's loss is averaged over."""
    n_sequences: int
    """Sequences that ran."""
    n_prompts: int
    """Prompts that they answer."""
    n_tokens: int
    """Response tokens."""
    largest: float
    """The largest |g|."""
    flushed_unscaled: float
    """Fraction of Σ|g| that FP16 turns into 0 without a loss scale."""
    scales: ScaleRange | None
    """Loss scales that serve every tensor, as exponents of 2, with the tensors that limit them; None where no tensor
    got a gradient."""
    flushed_allowed: float
    """Fraction of a tensor's Σ|g| that a loss scale may lose."""
    start_exponent: int
    """Exponent that torch's GradScaler starts at."""
    overflow_at_start: str | None
    """The first tensor that overflows there, in the order of the backward pass; None where none does."""
    scaler: ScalerTrace | None
    """A simulated dynamic scaler; None where no sequence had a finite gradient."""
    mass_by_exponent: dict[str, tuple[tuple[int, float], ...]]
    """Of gradients of `weight` and of `activation`: binary exponent and Σ|g|, where there is any."""
    tensors: tuple[GradientTensor, ...]
    """In the order in which the backward pass meets them."""

    def loss_scales(self) -> Finding:
        """Which loss scales serve every tensor: the one statement on it, wherever it is made."""
        scales = self.scales
        if scales is None:
            return Finding(code="audit-no-gradient", severity="note")
        if scales.high == NO_SCALE:
            return Finding(code="audit-gradient-not-finite", severity="fail", where=scales.high_by)
        values = {
            "low": scales.low,
            "high": scales.high,
            "low_by": scales.low_by,
            "high_by": scales.high_by,
            "allowed": self.flushed_allowed,
            "step_tokens": self.step_tokens,
        }
        code, severity = ("audit-no-loss-scale", "fail") if scales.empty else ("audit-loss-scales", "info")
        return Finding.model_validate({"code": code, "severity": severity, "where": scales.high_by, "values": values})


class LagCase(Result):
    """Gap between FP32 masters and their 16-bit copy, both computed in FP32."""

    name: str
    """Names the case."""
    dtype: str
    """What the engine keeps weights in."""
    rate: float | None
    """Learning rate of the one step of Adam from a checkpoint in that dtype; None for masters anywhere within half a
    unit of the engine's weights, as after many steps."""
    changed: float
    """Fraction of weights that differ at the engine from where it started."""
    mean_abs_logprob_diff: MetricValue
    """Mean |d|, nats."""
    kl_k3: MetricValue
    """KL k3, nats."""


class LayerMotion(Result):
    """Motion of a decoder layer's weights."""

    layer: int
    """Index of the layer."""
    steady_ulp: float
    """Mean |Δw| of a later step, units in the last place of the engine's dtype."""


class WeightMotion(Result):
    """When a step of Adam reaches an engine. Distances are in units in the last place (ulp) of its dtype."""

    dtype: str
    """Of the engine."""
    rate: float
    """Learning rate."""
    first_ulp: float | None
    """Mean |Δw| of the first step, ulp."""
    first_reached: float | None
    """Fraction of weights that the first step moves by more than half a unit."""
    steady_ulp: float | None
    """Mean |Δw| of a later step, ulp."""
    steady_ulp_median: float | None
    """Median of it."""
    straight_steps: float | None
    """Median number of steps in one direction until the engine's weight changes."""
    walk_steps: int | None
    """Step of a random walk by which half of the weights have reached the engine, from a checkpoint; None beyond what
    was simulated."""
    walk_steps_generic: int | None
    """The same in steady state."""
    walk_reached: float | None
    """Fraction of weights that reached the engine in the simulated steps, from a checkpoint."""
    walk_reached_generic: float | None
    """The same in steady state."""
    by_layer: tuple[LayerMotion, ...]
    """By decoder layer."""


class Motion(Result):
    """Simulated motion of weights under Adam."""

    steps: int
    """Steps that were simulated."""
    betas: tuple[float, float]
    """Of Adam."""
    n_weights: int
    """Sampled weights with a gradient."""
    n_without_gradient: int
    """Sampled weights without one."""
    rows: tuple[WeightMotion, ...]
    """By engine dtype and learning rate."""


class Lag(Result):
    """Lag of a 16-bit engine behind FP32 masters."""

    cases: tuple[LagCase, ...]
    """The gap that it makes."""
    n_sequences: int
    """Sequences that were scored."""
    batch: int
    """Sequences of the first step's gradient."""
    motion: Motion | None
    """None where gradients were not measured."""


class Attempt(Result):
    """A loss scale that was tried."""

    exponent: int
    """Of the scale."""
    forward: str | None
    """The first tensor of the forward pass that was not finite, None where all were."""
    backward: str | None
    """The same of the backward pass; None, too, where the forward pass was not finite."""


class Fp16Pass(Result):
    """A real forward and backward pass in FP16."""

    mode: str
    """Trainer mode, `cast` or `autocast`."""
    n_sequences: int
    """Sequences that ran; the last one without success where `finite` is false."""
    initial_exponent: int
    """Of the first loss scale."""
    exponent: int | None
    """Of the loss scale that left everything finite, None where none did."""
    finite: bool
    """Whether every tensor was finite in the end."""
    first_nonfinite_forward: str | None
    """The first tensor of a forward pass that was not finite."""
    first_nonfinite_backward: str | None
    """The first tensor of a backward pass that was not finite at some scale."""
    attempts: tuple[Attempt, ...]
    """Scales that were tried and failed, and the first one."""


class Range(Result):
    """What was measured on the model itself; None for what was not."""

    weights: Weights | None = None
    """Conversion of weights to 16 bits."""
    forward: Activations | None = None
    """Range of activations."""
    backward: Gradients | None = None
    """Range of gradients, and loss scales."""
    lag: Lag | None = None
    """Lag of the engine behind FP32 masters."""
    proof: Fp16Pass | None = None
    """A pass in FP16."""


class TouchedTokens(Result):
    """What a correction would touch."""

    correction: Correction
    """The correction with its bounds."""
    fraction: MetricValue
    """Fraction of response tokens whose weight it caps, or that it masks."""


class Snippet(Result):
    """A piece of configuration that does what is recommended."""

    framework: Literal["trl", "verl", "vllm"]
    """Whose."""
    text: str
    """To be pasted."""
    notes: tuple[Finding, ...]
    """What the framework has no key for."""


class Recommendation(PrecisionPair):
    """What to do."""

    verdict: Verdict
    """Of the pair."""
    loss_scale: float | None
    """First loss scale; None where the trainer needs none or none can be named."""
    correction: Correction | None
    """Of importance weights; None for no correction."""
    alarm_kl_k3: float | None
    """KL per token, nats, that a run should not exceed; None where it was not measured."""
    findings: tuple[Finding, ...]
    """The reasons, each with its number."""
    corrections: tuple[TouchedTokens, ...]
    """What each correction would touch."""
    snippets: tuple[Snippet, ...]
    """Configurations."""


class ProfileName(Result):
    """The limits that were applied."""

    name: str
    """Of a shipped profile, or of a file without its suffix."""
    description: str
    """One sentence."""


class AskedFor(Result):
    """Settings of the audit."""

    profile: str
    """A shipped profile's name, or a TOML file."""
    planned_tokens: int
    """Response length of the RL run, tokens."""
    step_tokens: int
    """Response tokens that a training step's loss is averaged over."""
    learning_rates: tuple[float, ...]
    """At which the engine's lag is computed."""
    pairs: tuple[str, ...]
    """`rollout/trainer` that decide; the recommended pair where there are none."""
    strict: bool
    """Whether a warning closes the gate."""


class Change(Result):
    """Something that two audits were made differently with."""

    what: str
    """Its name, dotted."""
    before: JsonValue
    """In the baseline, None where it was absent."""
    after: JsonValue
    """Now, None where it is absent."""


class ValueChange(Result):
    """How a value has changed."""

    kind: Literal["ratio", "difference"]
    """After over before, or after minus before."""
    value: float
    """The change."""
    ci_low: float | None
    """Lower 95 % limit, the two audits counted as independent; None where either has no interval."""
    ci_high: float | None
    """Upper limit."""


class CheckChange(PrecisionPair):
    """A check in two audits."""

    name: str
    """The check; `verdict` for a pair that was usable and is no longer shown to be."""
    before: float | None
    """Its value in the baseline."""
    after: float | None
    """Its value now."""
    verdict_before: Verdict
    """In the baseline."""
    verdict_after: Verdict
    """Now; inconclusive where the pair is gone."""
    change: ValueChange | None
    """None where either value is missing."""
    finding: Finding | None
    """Why it is a regression; None where it is none."""


class GoneCheck(PrecisionPair):
    """A check that the baseline has and this audit does not."""

    name: str
    """The check."""


class Baseline(Result):
    """Comparison with an older audit."""

    source: str
    """Where that lies."""
    model: str
    """Of it."""
    changed: tuple[Change, ...]
    """What differs in how the two were made."""
    checks: tuple[CheckChange, ...]
    """Every check that both have."""
    regressions: tuple[CheckChange, ...]
    """What is worse: pairs that were lost first."""
    gone: tuple[GoneCheck, ...]
    """What is no longer checked."""


class AuditProvenance(Result):
    """What could make the same audit come out differently."""

    created: str
    """When the comparison began, ISO 8601."""
    tool_version: str
    """Release that made it."""
    environment: Environment
    """Packages, machine and environment variables."""
    device: str
    """`cpu` or `cuda`."""
    config: CompareConfig
    """Settings of the comparison."""
    prompts_sha256: str | None
    """Digest of the prompts' token ids; None for recorded sequences."""
    model_files: dict[str, str] | None
    """Digest of each file of the model."""
    measured_with: dict[PartName, dict[str, str]]
    """By measurement on the model, versions of the packages that made it."""


class Audit(Document):
    """An audit: may the model go into RL, in which precision, with which correction?"""

    KIND: ClassVar[str] = "audit"
    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 2
    AGAIN: ClassVar[str] = "mismatch-probe audit --from {folder}"

    model: str
    """Its name."""
    n_prompts: int
    """Prompts of the comparison."""
    max_tokens: int
    """Longest response that was sampled, tokens."""
    verdict: Verdict
    """Of the pairs that decide; ok and warn open a gate, fail and inconclusive close it."""
    decided_by: tuple[PrecisionPair, ...]
    """The pairs that were asked for, or the recommended one."""
    answers: tuple[Answer, ...]
    """For FP16, BF16 and FP32 each, then for other pairs that were asked for."""
    findings: tuple[Finding, ...]
    """What holds of the whole model, e.g. that no log-prob is finite."""
    profile: ProfileName
    """Whose limits were applied."""
    options: AskedFor
    """What was asked for."""
    pairs: tuple[AuditedPair, ...]
    """Every pair with its checks."""
    recommendation: Recommendation | None
    """None where no pair ran, or none can be recommended."""
    range: Range
    """What was measured on the model itself."""
    missing: tuple[Finding, ...]
    """What was asked for and is not there, with the reason."""
    provenance: AuditProvenance
    """How it was made."""
    baseline: Baseline | None
    """Comparison with an older audit; None where none was named."""

    def pair(self, name: PrecisionPair) -> AuditedPair | None:
        """A pair by its name."""
        return next((pair for pair in self.pairs if pair.key == name.key), None)

    @property
    def deciding(self) -> tuple[AuditedPair, ...]:
        """The pairs that the verdict is of."""
        keys = {name.key for name in self.decided_by}
        return tuple(pair for pair in self.pairs if pair.key in keys)

    @property
    def regressed(self) -> bool:
        """Whether something is worse than in the baseline."""
        return self.baseline is not None and bool(self.baseline.regressions)

    @property
    def failed(self) -> bool:
        """Whether a gate has to close."""
        bad = ("fail", "inconclusive", "warn") if self.options.strict else ("fail", "inconclusive")
        return self.verdict in bad or self.regressed
