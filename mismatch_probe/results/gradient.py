"""The document of `rl gradient`: what the mismatch does to the policy gradient of a batch, under each correction."""

from __future__ import annotations

from typing import ClassVar

from mismatch_probe.config import CompareConfig
from mismatch_probe.metrics.gradient import GradientMetrics
from mismatch_probe.results.base import Document, Result
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

CentralRange = tuple[float, float]


class Reference(Result):
    """The estimate that every other one is compared with."""

    correction: str
    """Its correction, e.g. `"seq-is"`: one weight π/μ a sequence, without a cap, which is unbiased."""
    trainer_pass: str
    """The trainer pass whose log-probs are π, e.g. `"hf-float32-cast"`."""


class LengthEss(Result):
    """The effective sample size of sequence weights, predicted at one response length."""

    length: int
    """Response length in tokens."""
    ess_random_walk: MetricValue
    """exp(−E d²·T) as a fraction of the sequences: what it would be if the gaps of a sequence were uncorrelated."""
    ess_seq: MetricValue
    """The fraction that follows from the growth that was measured."""


class PairEss(Result):
    """What weights by one trainer's log-probs leave of the batch, as measured and as predicted."""

    trainer_pass: str
    """The trainer pass, e.g. `"hf-bfloat16-cast"`."""
    trainer_dtype: str
    """Its dtype."""
    trainer_mode: str
    """`cast` or `autocast`."""
    mean_length: float
    """Mean response length in tokens."""
    mean_abs_logprob_diff: MetricValue
    """Mean |d| over tokens, nats."""
    ess_seq: MetricValue
    """Effective sample size of the sequence weights, a fraction of the sequences."""
    ess_seq_gaussian: MetricValue
    """exp(−Var D), the same for Gaussian D."""
    ess_random_walk: MetricValue
    """exp(−E d²·T) at the mean length: what it would be if the gaps of a sequence were uncorrelated."""
    lengths: tuple[LengthEss, ...]
    """Predictions, by response length."""
    half_length: MetricValue
    """Response length in tokens at which `ess_seq` is predicted to fall below 0.5; a limit beyond the furthest
    prediction is null."""


class Draws(Result):
    """The central 95 % of draws of the advantages for this very batch; null where a draw is not finite."""

    cosine: CentralRange | None
    """Of the cosine with the reference."""
    norm_ratio: CentralRange | None
    """Of the ratio of norms."""


class GradientEstimate(Result):
    """The estimate under one correction with one trainer's log-probs."""

    correction: str
    """The correction, `"none"` for weights of 1."""
    trainer_pass: str | None
    """The trainer pass whose log-probs make the weights; None without a correction."""
    trainer_dtype: str | None
    """Its dtype."""
    trainer_mode: str | None
    """`cast` or `autocast`."""
    metrics: GradientMetrics
    """How it compares with the reference and with the estimate without weights."""
    draws: Draws
    """How much of that depends on the advantages of this batch."""


class RolloutGradient(Result):
    """All estimates from the sequences of one rollout pass."""

    rollout_pass: str
    """The rollout pass, e.g. `"vllm-bfloat16-decode"`."""
    rollout_dtype: str
    """Its dtype."""
    n_sequences: int
    """Sequences that count: those with tokens, all of them usable."""
    n_prompts: int
    """Prompts of these sequences, the unit of every interval."""
    n_tokens: int
    """Response tokens of these sequences."""
    n_empty: int
    """Sequences left out because they have no token."""
    n_nonfinite: int
    """Sequences left out because a log-prob is not finite."""
    n_impossible: int
    """Other sequences left out because a log-prob is impossible."""
    logprob_gap: float
    """Largest |Δ log-prob| of the gradient's forward pass against the run's FP32 trainer pass, nats."""
    pairs: tuple[PairEss, ...]
    """By trainer: that of the rollout's own dtype where there is one, then the one in FP32."""
    estimates: tuple[GradientEstimate, ...]
    """Every correction with every trainer's log-probs, the one without weights first."""

    def own(self, estimate: GradientEstimate) -> bool:
        """Whether an estimate needs nothing but what training in this dtype has: no weights, or its own trainer's."""
        return estimate.trainer_dtype in (None, self.rollout_dtype)


class MissingPass(Result):
    """A rollout pass that is left out."""

    rollout_pass: str
    """The rollout pass."""
    why: str
    """The reason."""


class Gradient(Document):
    """What the mismatch does to the policy gradient of a batch.

    All estimates of a rollout pass are made of the same sequences and the same scores in FP32 and differ in their
    weights alone. Advantages are synthetic: +1 or −1 with even chance, one a sequence, seeded by its token ids. So the
    numbers are the noise that weights bring, and no bias towards a reward.
    """

    KIND: ClassVar[str] = "gradient comparison"
    VERSION: ClassVar[int] = 3
    OLDEST: ClassVar[int] = 3
    AGAIN: ClassVar[str] = "mismatch-probe rl gradient --from {folder}/.."

    model: str
    """Name of the model."""
    config: CompareConfig
    """How the comparison was configured that brought the sequences and log-probs."""
    directions: int
    """Components that gradients are projected on; a cosine c has a standard error of about (1 − c²)/√directions."""
    reference: Reference
    """Correction and trainer pass of the estimate that every other one is compared with."""
    passes: tuple[RolloutGradient, ...]
    """By rollout pass."""
    missing: tuple[MissingPass, ...]
    """Rollout passes that are left out."""
    findings: tuple[Finding, ...]
    """What the numbers say, and what limits them."""
