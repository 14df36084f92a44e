"""What each metric is: one entry per key of METRICS.md, in its order. Definitions and sources are there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Prompts from which 95 % intervals cover about 95 % under heavy tails (benchmarks/coverage.py).
CALIBRATED_PROMPTS = 32
# Second moments of heavy tails need more. What a few huge weights decide is marked by these: `sample.few_decide`.
_CALIBRATED = {
    "p99_abs_logprob_diff": 64,
    "std_prob_diff": 64,
    "pearson_prob": 64,
    "ess_token": 64,
    "seq_log_ratio_std": 64,
    "ess_seq_gaussian": 64,
    "ess_seq_truncated": 64,
    "verl_is_std": 64,
    "verl_ess": 64,
    "chi2_seq": 64,
    "ess_seq": 64,
    "ess_weights": 64,
    **dict.fromkeys(("kl_exact", "kl_exact_reverse", "js_exact", "chi2_exact", "kl_seq_exact"), 64),
}
_BOUNDS = {
    **dict.fromkeys(("mean_abs_prob_diff", "std_prob_diff", "max_abs_prob_diff", "frac_outside_clip"), (0.0, 1.0)),
    **dict.fromkeys(("confident_disagreement_rate", "tv_exact", "top1_flip_rate"), (0.0, 1.0)),
    **dict.fromkeys(("ess_token", "ess_seq", "ess_seq_gaussian", "ess_seq_truncated", "verl_ess"), (0.0, 1.0)),
    **dict.fromkeys(("chi2_token", "chi2_seq"), (-1.0, math.inf)),
    **dict.fromkeys(("token_mult_prob_error", "seq_mult_prob_error_max"), (1.0, math.inf)),
    **dict.fromkeys(("mean_ratio", "ppl_ratio"), (0.0, math.inf)),
    "pearson_prob": (-1.0, 1.0),
    "js_exact": (0.0, math.log(2)),
    "verl_is_mean": (0.0, 2.0),
    "verl_is_std": (0.0, 1.0),
}


@dataclass(frozen=True)
class MetricInfo:
    """A metric as tables, figures and reports show it.

    Attributes:
        key: Name in every file, e.g. `"kl_k3"`.
        title: A few words for a heading or an axis.
        formula: In the symbols of METRICS.md.
        unit: `"nats"`, `"probability"`, …; empty for a pure number.
        level: Whether rows are tokens, sequences, or positions of which the full rows of logits were compared.
        needs_on_policy: True where the metric means nothing unless the rollout policy itself sampled the tokens.
        positive: True where the metric is ≥ 0 and is compared by ratio, on a logarithmic axis.
        has_interval: False for extremes, counts and k̂.
    """

    key: str
    title: str
    formula: str
    unit: str
    level: Literal["token", "sequence", "exact"]
    needs_on_policy: bool = False
    positive: bool = False
    has_interval: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        """What no value can lie beyond."""
        return _BOUNDS.get(self.key, (0.0 if self.positive else -math.inf, math.inf))


def calibrated_prompts(key: str) -> int:
    """Below this many prompts the interval of metric `key` is marked uncalibrated."""
    return _CALIBRATED.get(key, CALIBRATED_PROMPTS)


_TOKEN = (
    MetricInfo("mean_abs_logprob_diff", "Mean |Δ log-prob|", "mean |d|", "nats", "token", positive=True),
    MetricInfo("rms_logprob_diff", "RMS Δ log-prob", "sqrt(mean d²)", "nats", "token", positive=True),
    MetricInfo("p99_abs_logprob_diff", "99th percentile |Δ log-prob|", "q₀.₉₉ |d|", "nats", "token", positive=True),
    MetricInfo(
        "max_abs_logprob_diff", "Largest |Δ log-prob|", "max |d|", "nats", "token", positive=True, has_interval=False
    ),
    MetricInfo("mean_abs_prob_diff", "Mean |Δ probability|", "mean |eᵃ − eᵇ|", "probability", "token", positive=True),
    MetricInfo(
        "std_prob_diff", "Standard deviation of |Δ probability|", "sd |eᵃ − eᵇ|", "probability", "token", positive=True
    ),
    MetricInfo(
        "max_abs_prob_diff",
        "Largest |Δ probability|",
        "max |eᵃ − eᵇ|",
        "probability",
        "token",
        positive=True,
        has_interval=False,
    ),
    MetricInfo("pearson_prob", "Correlation of probabilities", "corr(eᵃ, eᵇ)", "", "token"),
    MetricInfo("kl_k1", "KL estimate k1", "mean(b − a)", "nats", "token", needs_on_policy=True),
    MetricInfo("kl_k2", "KL estimate k2", "½ mean d²", "nats", "token", positive=True),
    MetricInfo("kl_k3", "KL estimate k3", "mean(eᵈ − 1 − d)", "nats", "token", positive=True),
    MetricInfo("token_mult_prob_error", "Multiplicative probability error", "mean exp|d|", "", "token"),
    MetricInfo("js_k3", "Jensen–Shannon estimate", "mean(½k3(a‖m) + ½k3(b‖m))", "nats", "token", positive=True),
    MetricInfo("chi2_token", "χ² per token", "mean ρ² − 1", "", "token", needs_on_policy=True),
    MetricInfo("ess_token", "Effective sample size, tokens", "(Σρ)² / (n Σρ²)", "", "token", needs_on_policy=True),
    MetricInfo("mean_ratio", "Mean importance ratio", "mean ρ", "", "token", needs_on_policy=True),
    MetricInfo("frac_outside_clip", "Share of ratios outside the clip range", "mean 1[ρ ∉ clip]", "", "token"),
    MetricInfo("confident_disagreement_rate", "Confident disagreements", "mean 1[b > −0.7, d < −2]", "", "token"),
    MetricInfo(
        "confident_disagreement_count",
        "Number of confident disagreements",
        "Σ 1[b > −0.7, d < −2]",
        "tokens",
        "token",
        has_interval=False,
    ),
)

_SEQUENCE = (
    MetricInfo("seq_log_ratio_mean", "Mean sequence log ratio", "mean D", "nats", "sequence", needs_on_policy=True),
    MetricInfo("seq_log_ratio_std", "Spread of the sequence log ratio", "sd D", "nats", "sequence", positive=True),
    MetricInfo("seq_log_ratio_min", "Smallest sequence log ratio", "min D", "nats", "sequence", has_interval=False),
    MetricInfo("seq_log_ratio_max", "Largest sequence log ratio", "max D", "nats", "sequence", has_interval=False),
    MetricInfo("kl_seq", "Sequence KL", "−mean D", "nats", "sequence", needs_on_policy=True),
    MetricInfo(
        "seq_log_ratio_slope_per_1k",
        "Sequence log ratio per 1,000 tokens, slope",
        "slope of D on T/1000",
        "nats per 1,000 tokens",
        "sequence",
        needs_on_policy=True,
    ),
    MetricInfo(
        "seq_log_ratio_intercept",
        "Sequence log ratio at length 0",
        "intercept of D on T/1000",
        "nats",
        "sequence",
        needs_on_policy=True,
    ),
    MetricInfo(
        "seq_log_ratio_rate_per_1k",
        "Sequence log ratio per 1,000 tokens, rate",
        "1000 ΣD / ΣT",
        "nats per 1,000 tokens",
        "sequence",
        needs_on_policy=True,
    ),
    MetricInfo("chi2_seq", "χ² per sequence", "mean e²ᴰ − 1", "", "sequence", needs_on_policy=True),
    MetricInfo(
        "ess_seq", "Effective sample size, sequences", "(Σw)² / (N Σw²), w = eᴰ", "", "sequence", needs_on_policy=True
    ),
    MetricInfo(
        "ess_seq_gaussian", "Effective sample size, Gaussian D", "exp(−Var D)", "", "sequence", needs_on_policy=True
    ),
    MetricInfo(
        "ess_seq_truncated",
        "Effective sample size, truncated weights",
        "(Σw)² / (N Σw²), w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
    ),
    MetricInfo(
        "verl_is_mean", "verl rollout_is_mean", "ΣTw / ΣT, w = min(eᴰ, 2)", "", "sequence", needs_on_policy=True
    ),
    MetricInfo(
        "verl_is_std",
        "verl rollout_is_std",
        "sd of w over tokens, w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
        positive=True,
    ),
    MetricInfo(
        "verl_ess",
        "verl rollout_is_eff_sample_size",
        "(ΣTw)² / (ΣT ΣTw²), w = min(eᴰ, 2)",
        "",
        "sequence",
        needs_on_policy=True,
    ),
    MetricInfo("pareto_k", "Pareto k̂", "k̂ of eᴰ", "", "sequence", needs_on_policy=True, has_interval=False),
    MetricInfo(
        "log_ppl_diff", "Log perplexity gap", "mean over sequences of −D/T", "nats", "sequence", needs_on_policy=True
    ),
    MetricInfo("ppl_ratio", "Perplexity ratio", "mean exp(−D/T)", "", "sequence", needs_on_policy=True),
    MetricInfo(
        "seq_mult_prob_error_max",
        "Largest multiplicative probability error of a sequence",
        "max over sequences of mean exp|d|",
        "",
        "sequence",
        has_interval=False,
    ),
)

_EXACT = (
    MetricInfo("kl_exact", "Exact KL(μ‖π)", "mean Σ μ (log μ − log π)", "nats", "exact", positive=True),
    MetricInfo("kl_exact_reverse", "Exact KL(π‖μ)", "mean Σ π (log π − log μ)", "nats", "exact", positive=True),
    MetricInfo("js_exact", "Exact Jensen–Shannon", "mean JS(μ, π)", "nats", "exact", positive=True),
    MetricInfo("tv_exact", "Exact total variation", "mean ½ Σ |μ − π|", "probability", "exact", positive=True),
    MetricInfo("top1_flip_rate", "Likeliest token differs", "mean 1[argmax μ ≠ argmax π]", "", "exact"),
    MetricInfo("entropy_rollout", "Entropy of the rollout policy", "mean H(μ)", "nats", "exact", positive=True),
    MetricInfo("entropy_trainer", "Entropy of the trainer policy", "mean H(π)", "nats", "exact", positive=True),
    MetricInfo("chi2_exact", "Exact χ²", "mean Σ π²/μ − 1", "", "exact", positive=True),
    MetricInfo("kl_seq_exact", "Sequence KL from exact positions", "mean Σₜ KLₜ", "nats", "exact", positive=True),
)

CATALOG: dict[str, MetricInfo] = {info.key: info for info in (*_TOKEN, *_SEQUENCE, *_EXACT)}
