"""A gradient document in miniature: three rollout dtypes, of which the first is turned by the mismatch."""

from __future__ import annotations

from collections.abc import Mapping

from mismatch_probe.config import CompareConfig
from mismatch_probe.metrics.gradient import GRADIENT_KEYS, GradientMetrics
from mismatch_probe.probes.gradient.result import findings_of
from mismatch_probe.results.gradient import (
    Draws,
    Gradient,
    GradientEstimate,
    LengthEss,
    MissingPass,
    PairEss,
    Reference,
    RolloutGradient,
)
from mismatch_probe.types import MetricValue

CORRECTIONS = ("token-tis", "token-mis", "seq-is", "seq-tis", "seq-mis")
COSINES = {"bfloat16": 0.9, "float16": 0.992, "float32": 0.999}


def metric(value: float, half: float = 0.002) -> MetricValue:
    return MetricValue(value, value - half, value + half)


def estimate(correction: str, trainer: str | None, cosine: MetricValue) -> GradientEstimate:
    """With the same value for every metric."""
    return GradientEstimate(
        correction=correction,
        trainer_pass=trainer and f"hf-{trainer}-cast",
        trainer_dtype=trainer,
        trainer_mode=trainer and "cast",
        metrics=GradientMetrics(**dict.fromkeys(GRADIENT_KEYS, cosine)),
        draws=Draws(cosine=(0.8, 0.95), norm_ratio=None),
    )


def pair(trainer: str) -> PairEss:
    return PairEss(
        trainer_pass=f"hf-{trainer}-cast",
        trainer_dtype=trainer,
        trainer_mode="cast",
        mean_length=94.0,
        mean_abs_logprob_diff=metric(0.04),
        ess_seq=metric(0.6),
        ess_seq_gaussian=metric(0.61),
        ess_random_walk=metric(0.62),
        lengths=(LengthEss(length=384, ess_random_walk=metric(0.4), ess_seq=metric(0.45)),),
        half_length=MetricValue(183.0, 152.0, None, "a limit lies beyond 752 tokens"),
    )


def rollout(dtype: str, cosine: float | MetricValue) -> RolloutGradient:
    """Corrections get closer to the reference one after the other, by 0.001."""
    value = metric(cosine) if isinstance(cosine, float) else cosine
    base = value.value if value.value is not None else 0.9
    trainers = list(dict.fromkeys([dtype, "float32"]))
    weighted = [
        estimate(name, trainer, metric(base + i / 1000))
        for trainer in trainers
        for i, name in enumerate(CORRECTIONS, start=1)
    ]
    return RolloutGradient(
        rollout_pass=f"vllm-{dtype}-decode",
        rollout_dtype=dtype,
        n_sequences=32,
        n_prompts=32,
        n_tokens=3_007,
        n_empty=0,
        n_nonfinite=0,
        n_impossible=0,
        logprob_gap=1e-5,
        pairs=tuple(map(pair, trainers)),
        estimates=(estimate("none", None, value), *weighted),
    )


def gradient(
    cosines: Mapping[str, float | MetricValue] = COSINES,
    passes: tuple[RolloutGradient, ...] = (),
    missing: tuple[MissingPass, ...] = (),
    config: CompareConfig | None = None,
) -> Gradient:
    """A document of the given passes, or of one for each dtype with the cosine of its estimate without weights."""
    passes = passes or tuple(rollout(dtype, cosine) for dtype, cosine in cosines.items())
    return Gradient(
        schema_version=3,
        tool_version="0.1.0",
        model="smollm2-135m",
        config=config or CompareConfig(model="smollm2-135m", max_tokens=128),
        directions=16_384,
        reference=Reference(correction="seq-is", trainer_pass="hf-float32-cast"),
        passes=passes,
        missing=missing,
        findings=tuple(findings_of(passes, missing)),
    )
