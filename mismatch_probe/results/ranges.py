"""What an audit measures on the model itself: ranges of its numbers, and what 16 bits do to them."""

from __future__ import annotations

from typing import Literal

from mismatch_probe.metrics.floats import NO_SCALE, ScaleRange, ScalerTrace
from mismatch_probe.results.base import Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

PartName = Literal["weights", "forward", "backward", "lag", "proof"]
PARTS: tuple[PartName, ...] = ("weights", "forward", "backward", "lag", "proof")
"""What is measured on the model itself, in the order in which it is measured."""


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
