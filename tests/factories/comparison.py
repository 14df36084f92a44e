"""A comparison, and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.curves import WhereBin
from mismatch_probe.metrics.exact import EstimatorCost
from mismatch_probe.metrics.length_prediction import KEYS, LengthPrediction
from mismatch_probe.metrics.self_noise import SelfNoise
from mismatch_probe.results.comparison import (
    Comparison,
    Crossing,
    LengthGrowth,
    LimitCheck,
    MissingPair,
    Pair,
    PairName,
    PairSelfNoise,
    SelfNoisePass,
)
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

SCALES = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 5e-6}
ERRORS = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 4e-6}


def value(estimate: float, spread: float = 0.1) -> MetricValue:
    """A metric with an interval of ± `spread` of it."""
    return MetricValue(estimate, estimate - spread * abs(estimate), estimate + spread * abs(estimate))


def absent(why: str = "not computed") -> MetricValue:
    return MetricValue(None, why=why)


def make_name(rollout: str = "bfloat16", trainer: str = "bfloat16", mode: str = "cast") -> dict[str, str]:
    """The fields of a `PairName`."""
    return {
        "rollout_pass": f"vllm-{rollout}-decode" if rollout != "recorded" else "recorded-rollout",
        "trainer_pass": f"hf-{trainer}-{mode}" if trainer != "recorded" else "recorded-trainer",
        "rollout_dtype": rollout,
        "trainer_dtype": trainer,
        "trainer_mode": mode,
    }


def make_self_noise(pass_id: str = "vllm-bfloat16-decode", mean_abs: float = 1.2e-4) -> SelfNoisePass:
    engine, dtype = pass_id.split("-")[:2]
    measured = SelfNoise(1024, 64, 3, mean_abs, 10 * mean_abs, 0, 0)
    return SelfNoisePass(
        pass_id=pass_id, self_noise_pass=f"{pass_id}-null", engine=engine, dtype=dtype, measured=measured
    )


def make_metrics(size: float, **changes: MetricValue) -> dict[str, MetricValue]:
    """Every metric of the catalogue, few of them with a value; `size` is the mean |d|, nats."""
    known = {
        "mean_abs_logprob_diff": value(size),
        "max_abs_logprob_diff": MetricValue(30 * size),
        "kl_k3": MetricValue(size**2, 0.8 * size**2, 1.3 * size**2),
        "ess_seq": MetricValue(0.93, 0.9, 0.95),
        "pareto_k": absent("fewer than 200 sequences"),
    }
    return dict.fromkeys(CATALOG, absent()) | known | changes


def make_pair(
    rollout: str = "bfloat16",
    trainer: str = "bfloat16",
    mode: str = "cast",
    *,
    size: float | None = None,
    **changes: Any,
) -> Pair:
    """An on-policy pair of 64 prompts; `size` is its mean |d|, nats."""
    size = max(SCALES.get(rollout, 0.0), SCALES.get(trainer, 0.0)) if size is None else size
    fields: dict[str, Any] = {
        **make_name(rollout, trainer, mode),
        "on_policy": True,
        "n_tokens": 10_240,
        "n_sequences": 64,
        "n_prompts": 64,
        "n_prompts_usable": 64,
        "n_nonfinite": 0,
        "n_excluded": 0,
        "excluded": (),
        "mean_abs_logprob_diff_all_finite": None,
        "n_nonfinite_exact": 0,
        "metrics": make_metrics(size),
        "budget": None,
        "estimators": None,
        "ratio_tests": (),
        "prompts_needed": {},
        "groups": (),
        "self_noise": PairSelfNoise(
            rollout=make_self_noise(f"vllm-{rollout}-decode", 1.2e-4 if rollout == "bfloat16" else 0.0)
        ),
    }
    return Pair(**(fields | changes))


def make_comparison(
    dtypes: Sequence[str] = tuple(SCALES), *, modes: Sequence[str] = ("cast",), **changes: Any
) -> Comparison:
    """All pairs of some dtypes."""
    pairs = tuple(make_pair(rollout, trainer, mode) for rollout in dtypes for trainer in dtypes for mode in modes)
    ratio = Finding(
        code="bf16-over-fp16", severity="info", values={"ratio": MetricValue(7.9, 7.0, 8.9), "n_prompts": 64}
    )
    fields: dict[str, Any] = {
        "model": "smollm2-135m",
        "reference": None,
        "pairs": pairs,
        "self_noise": (make_self_noise(), make_self_noise("hf-bfloat16-cast", 0.0)),
        "findings": (ratio,),
    }
    return Comparison(**Comparison.stamp(), **(fields | changes))


def make_missing(rollout: str = "bfloat16", trainer: str = "bfloat16", why: str = "it failed") -> MissingPair:
    return MissingPair(**make_name(rollout, trainer), why=why)


def make_limit(limit: str, measured: float | None, verdict: str, why: str = "") -> LimitCheck:
    return LimitCheck(**make_name(), limit=limit, value=measured, verdict=verdict, why=why)


def with_exact(comparison: Comparison, *, reference: str = "hf-float64-cast") -> Comparison:
    """With full rows of logits, a reference and sorted tokens; only bfloat16 sampled."""
    pairs = tuple(_exact_pair(pair) for pair in comparison.pairs)
    where = {pair.rollout_dtype: make_where() for pair in pairs}
    return comparison.model_copy(update={"pairs": pairs, "reference": reference, "where": where})


def _exact_pair(pair: Pair) -> Pair:
    size = pair.metrics["mean_abs_logprob_diff"].value or 0.0
    rollout, trainer = 1.5 * ERRORS[pair.rollout_dtype], ERRORS[pair.trainer_dtype]
    on_policy, elsewhere = pair.rollout_dtype == "bfloat16", absent("these tokens were sampled by A")
    metrics = pair.metrics | {
        "kl_k1": value(-0.5 * size**2, 40.0) if on_policy else elsewhere,
        "ess_seq": value(0.9, 0.02) if on_policy else elsewhere,
        "kl_k2": value(1.1 * size**2, 0.3),
        "kl_exact": value(0.9 * size**2),
        "top1_flip_rate": value(0.0125, 0.5),
    }
    budget = {
        "rollout_error_rms": value(rollout),
        "trainer_error_rms": value(trainer),
        "predicted_gap_rms": value((rollout**2 + trainer**2) ** 0.5),
        "measured_gap_rms": value(1.25 * size),
        "error_correlation": value(0.2, 0.5),
        "measured_over_predicted": absent("one side is the reference itself"),
    }
    estimators = tuple(
        EstimatorCost(key, size**2, 0.0, k * size, 22_832_564_803_474 // k if size else None)
        for k, key in enumerate(("kl_k1", "kl_k2", "kl_k3", "kl_exact"), start=1)
    )
    update = {"on_policy": on_policy, "metrics": metrics, "budget": budget, "estimators": estimators}
    return pair.model_copy(update=update)


def make_where() -> dict[str, tuple[WhereBin, ...]]:
    """Three bins of every property; only the first has an interval."""
    labels = {
        "probability": ("0–0.01", "0.01–0.5", "0.5–1"),
        "entropy": ("0–1", "1–2", "≥ 6"),
        "rank": ("0", "1", "≥ 1000"),
        "position": ("0–9", "10–19", "20–29"),
        "token_kind": ("digit", "word", "special"),
    }
    return {
        name: tuple(
            WhereBin(label, 1000 * (k + 1), (k + 1) / 6, (3 - k) / 6, 1e-2, None if k else 9e-3, None if k else 1.1e-2)
            for k, label in enumerate(names)
        )
        for name, names in labels.items()
    }


def make_growth(**changes: Any) -> LengthGrowth:
    """A random walk with one prediction, at 1,024 tokens."""
    values = dict.fromkeys(KEYS, value(0.5)) | {"ess_seq": MetricValue(0.4, 0.3, 0.5)}
    fields: dict[str, Any] = {
        "observed_length": 128,
        "n_sequences": 64,
        "n_prompts": 64,
        "n_cut": 0,
        "variance_exponent": MetricValue(1.0, 0.8, 1.2),
        "variance_ratio": MetricValue(1.0, 0.9, 1.1),
        "seq_log_ratio_mean": MetricValue(0.0, -0.1, 0.1),
        "model_weight": {},
        "trend_weight": None,
        "contradicted": {},
        "why": "",
        "predictions": (LengthPrediction(1024, values),),
        "crossings": (Crossing(ess_seq=0.5, length=MetricValue(900.0, 700.0, None, "its limit lies beyond")),),
    }
    return LengthGrowth(**(fields | changes))


def name_of(pair: PairName) -> tuple[str, str, str]:
    """Dtypes and mode."""
    return pair.rollout_dtype, pair.trainer_dtype, pair.trainer_mode
